"""What is checked of a pickle from outside before it is loaded: how much work it asks for.

An unpickler that runs no foreign code still hashes what becomes a key and calls the classes that it
knows. A tuple that holds the one before it twice, thirty times over, is 200 bytes and 2**30 steps
to hash; a list that is short to name again can be copied a million times. So the pickle's opcodes
are followed with the sizes of values in the place of values. Python's pickletools says what each
opcode does.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Steps that any pickle may ask for, beside those in proportion to its length.
_FREE_STEPS = 1_000_000
# Python's hash of a tuple calls itself for the tuples in it, on the thread's stack.
_DEEPEST = 200
_CHARACTERS_A_STEP = 16


def check_pickle(data: bytes) -> None:
    """Refuse a pickle whose loading would take far more time or memory than its length.

    Everything that torch.save writes passes. A pickle that passes may still be damaged, or name
    code: it is for an unpickler that knows what it may call, as torch's with `weights_only`.

    Raises:
        ValueError: with the reason, in one line.
    """
    machine = _Machine(len(data))
    try:
        for opcode, argument, _position in pickletools.genops(data):
            step = _STEPS.get(opcode.name)
            if step is None:
                raise ValueError(f"it has the opcode {opcode.name}, which torch.save never writes")
            step(machine, argument)
    except (IndexError, KeyError):
        raise ValueError("it takes values that it never made") from None
    except OverflowError as error:
        raise ValueError(str(error)) from None


@dataclass(slots=True)
class _Value:
    """What is known of a value: steps to walk through it, tuples in tuples, and its kind.

    `name` is a global's, or the text of a string; `parts` are a tuple's.
    """

    size: int = 1
    depth: int = 0
    name: str = ""
    is_global: bool = False
    is_integer: bool = False
    parts: "tuple[_Value, ...]" = ()


_PLAIN = _Value()
_INTEGER = _Value(is_integer=True)


@dataclass(slots=True)
class _Machine:
    """The unpickler's stack and memo, and the steps it has taken."""

    length: int
    steps: int = 0  # spent on hashing and on calls
    stack: list[_Value] = field(default_factory=list)
    marked: list[list[_Value]] = field(default_factory=list)
    memo: dict[int, _Value] = field(default_factory=dict)

    def within_reason(self, steps: int) -> int:
        if steps > _FREE_STEPS + 4 * self.length:
            raise ValueError("it unfolds to far more than its length")
        return steps

    def charge(self, *values: _Value) -> None:
        self.steps = self.within_reason(self.steps + sum(value.size for value in values))

    def mark(self, _argument: object) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[_Value]:
        values, self.stack = self.stack, self.marked.pop()
        return values

    def take(self, count: int) -> list[_Value]:
        return [self.stack.pop() for _ in range(count)][::-1]

    def push_text(self, text: str | bytes) -> None:
        name = text if isinstance(text, str) else ""
        self.stack.append(_Value(size=1 + len(text) // _CHARACTERS_A_STEP, name=name))

    def push_global(self, name: str) -> None:
        self.stack.append(_Value(name=name.replace(" ", "."), is_global=True))

    def push_tuple(self, parts: list[_Value]) -> None:
        depth = 1 + max((part.depth for part in parts), default=0)
        if depth > _DEEPEST:
            raise ValueError(f"it has more than {_DEEPEST} tuples in one another")
        size = self.within_reason(1 + sum(part.size for part in parts))
        self.stack.append(_Value(size=size, depth=depth, parts=tuple(parts)))

    def put(self, index: int) -> None:
        if index > self.length:
            raise ValueError("its memo is larger than itself")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def append(self, values: list[_Value]) -> None:
        target = self.stack[-1]
        if target is _PLAIN or target is _INTEGER:
            raise ValueError("it fills a value that holds no others")
        target.size = self.within_reason(target.size + sum(value.size for value in values))

    def set_items(self, pairs: list[_Value]) -> None:
        self.charge(*pairs[::2])
        self.append(pairs)

    def call(self, _argument: object) -> None:
        function, arguments = self.take(2)
        if not function.is_global:
            raise ValueError("it calls something that it does not name")
        self.charge(arguments)
        match function.name, arguments.parts:
            case "builtins.bytearray", [_Value(is_integer=True), *_]:
                raise ValueError("it asks for memory by a number")
            case "_codecs.encode", [_, codec, *_] if codec.name not in {"latin1", "latin-1"}:
                raise ValueError("it asks for text in a code that is not its own")
        self.stack.append(_Value(size=1 + arguments.size))

    def build(self, _argument: object) -> None:
        (state,) = self.take(1)
        self.charge(state)
        self.append([state])

    def persistent(self, _argument: object) -> None:
        self.charge(*self.take(1))
        self.stack.append(_PLAIN)


def _push(value: _Value) -> Callable[[_Machine, Any], None]:
    return lambda machine, _argument: machine.stack.append(value)


def _push_container(machine: _Machine, _argument: object) -> None:
    machine.stack.append(_Value())


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _argument: machine.push_tuple(machine.take(count))


def _nothing(_machine: _Machine, _argument: object) -> None:
    pass


# The opcodes that torch.load knows.
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "STOP"), _nothing),
    **dict.fromkeys(("NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT"), _push(_PLAIN)),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), _push(_INTEGER)),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"), _push_container),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINSTRING"), _Machine.push_text),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call),
    "GLOBAL": _Machine.push_global,
    "MARK": _Machine.mark,
    "EMPTY_TUPLE": _tuple_of(0),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": lambda machine, _argument: machine.push_tuple(machine.since_mark()),
    "APPEND": lambda machine, _argument: machine.append(machine.take(1)),
    "APPENDS": lambda machine, _argument: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _argument: machine.set_items(machine.take(2)),
    "SETITEMS": lambda machine, _argument: machine.set_items(machine.since_mark()),
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
