"""The toy nuScenes: a small procedural world, ray-traced into images, LiDAR points and occupancy labels.

``road`` and ``objects`` describe a world, ``world`` lays out one scene of it, ``rig`` carries the sensors,
``trace_cpu`` / ``trace_torch`` find what a ray meets, ``shade`` colours it, ``labels`` voxelises the same
surfaces, ``tables`` writes nuScenes' tables and ``generate`` runs the whole. Frames: *map* (the scene's
global frame, metres, z up), *ego* (x forward, y left, z up, on the ground below the rear axle), *camera*
(x right, y down, z forward) and LIDAR_TOP (x right, y forward, z up).
"""
