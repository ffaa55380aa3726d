"""Occ3D-nuScenes, release 1.0's pipelines: images resized and cropped at random, the volume as it is."""

task = dict(  # over Occ3D's volume, the default of lib/task.py
    label_set='occ3d',
    panoptic=False,
    voxel_size=0.4,
    num_frames=8,
    cameras=['CAM_FRONT', 'CAM_FRONT_RIGHT', 'CAM_FRONT_LEFT', 'CAM_BACK', 'CAM_BACK_LEFT', 'CAM_BACK_RIGHT'],
    image_size=(256, 704),  # height, width of what the network sees
)

_test_pipeline = [dict(type='LoadMultiViewImageFromMultiSweeps'), dict(type='RandomTransformImage')]

data = dict(
    workers_per_gpu=4,
    train=dict(
        type='NuSceneOcc',
        data_root='data/nuscenes/',
        ann_file='nuscenes_infos_train_sweep.pkl',
        occ_gt_root='occ3d',
        pipeline=[
            dict(type='LoadMultiViewImageFromMultiSweeps'),
            dict(type='LoadOccGTFromFile'),
            dict(type='RandomTransformImage', resize_lim=(0.38, 0.55), rand_flip=False),
        ],
        test_mode=False,
    ),
    val=dict(
        type='NuSceneOcc',
        data_root='data/nuscenes/',
        ann_file='nuscenes_infos_val_sweep.pkl',
        occ_gt_root='occ3d',
        pipeline=_test_pipeline,
        test_mode=True,
    ),
    test=dict(
        type='NuSceneOcc',
        data_root='data/nuscenes/',
        ann_file='nuscenes_infos_test_sweep.pkl',
        occ_gt_root=None,  # the test split has no labels
        pipeline=_test_pipeline,
        test_mode=True,
    ),
)
