"""How it is shown what a run is doing, while it does."""
