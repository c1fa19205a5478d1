"""The doors: `exported` (optimize), `dynamo` (torch.compile) and `eager` (swap)."""
