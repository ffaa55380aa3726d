"""Making the project's own files from nuScenes: info files with camera sweeps, panoptic labels."""
