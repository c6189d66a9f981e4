"""A naive game: lists of tiles, one move of one line at a time."""

from functools import cache

MOVES = ("up", "down", "left", "right")


@cache
def slide(line: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Push a line towards its first cell. Return it and the number of pairs that merged."""
    waiting = [tile for tile in line if tile]
    pushed, merged = [], 0
    while waiting:
        tile = waiting.pop(0)
        if waiting and waiting[0] == tile:
            waiting.pop(0)
            tile += 1
            merged += 1
        pushed.append(tile)
    return (*pushed, *[0] * (4 - len(pushed))), merged


def lines(board: tuple[int, ...], move: str) -> list[tuple[int, ...]]:
    """Cut a board into lines, each from the cell that a move pushes towards."""
    if move in ("left", "right"):
        cut = [board[4 * row : 4 * row + 4] for row in range(4)]
    else:
        cut = [board[column::4] for column in range(4)]
    return cut if move in ("left", "up") else [line[::-1] for line in cut]


def describe(board: tuple[int, ...]) -> dict[str, int | list[int]]:
    """Compute every label of a board by the rules of the game."""
    legal, merges = [], []
    for move in MOVES:
        pushed = [(line, *slide(line)) for line in lines(board, move)]
        legal.append(int(any(line != after for line, after, _ in pushed)))
        merges.append(sum(merged for _, _, merged in pushed))
    largest = max(board)
    return {
        "empty_cells": sum(tile == 0 for tile in board),
        "max_exponent": largest,
        "max_in_corner": int(largest > 0 and largest in (board[0], board[3], board[12], board[15])),
        "legal_moves": legal,
        "merges": merges,
    }
