"""The three doors to one catalogue: `exported` (optimize), `dynamo` (torch.compile), `eager` (swap)."""
