"""Data: rendered scenes, transforms, datasets and loaders."""
