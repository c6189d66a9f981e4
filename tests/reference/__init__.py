"""Independent truth for the tests, written from the formats. Imports none of the package."""
