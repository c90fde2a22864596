"""The packs that ship with mien, one folder a model."""
