"""What several tests use: the cases, the oracle, meshes, files of clicks, whole trainings."""
