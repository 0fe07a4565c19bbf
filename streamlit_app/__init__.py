"""The page. It speaks JSON with TorchServe and imports nothing else of the repository."""
