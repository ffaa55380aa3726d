"""Pictures of samples: camera images, occupancy and legends."""
