"""Data: readers, transforms, samplers and LightningDataModules. Never imports models."""
