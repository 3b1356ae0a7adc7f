"""The main job, as named stages."""
