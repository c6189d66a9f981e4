"""Reading finished files back."""
