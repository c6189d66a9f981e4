"""What the tests hold the package against: written from the formats, importing none of its code."""
