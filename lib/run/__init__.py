"""The run set-up that the scripts share: processes, seeds, run folder, training and evaluation loops.

Nothing here knows SparseOcc, nuScenes or their packages: the scripts build the model, the data sets and the
evaluator and hand them in.
"""
