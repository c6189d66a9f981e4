"""What every part knows of the game: the board's size and the number of moves."""

CELLS = 16
MOVES = 4
