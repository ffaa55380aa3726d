"""What is not SparseOcc's own: geometry, class tables, ray casting, run set-up. Imports neither models nor loaders."""
