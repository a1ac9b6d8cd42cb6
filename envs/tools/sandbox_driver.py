"""The child process in which CPython runs an agent's code: confines itself, then runs one piece of code after another.

Run by its path as ``sandbox_driver.py REQUESTS REPLIES PARENT MEMORY SEED``: two file descriptors, the process to die
with, bytes, and the seed of ``random``. The current folder is the one that code may write. A request is a nonce, a
length and the code in UTF-8; a reply the same nonce, a length and the text of the error, empty without one. Code prints
to descriptors 1 and 2. Whatever a reply says, it says on behalf of code that may have rewritten this module.
"""

from __future__ import annotations

import os
import struct
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import sandbox_lockdown

sys.path.pop(0)

NONCE = 16
MAX_ERROR = 4000
_FILE = "<python>"


def confine(memory: int, parent: int) -> None:
    """Die with the parent, load what needs a file outside the standard library's folders, lock the door."""
    sandbox_lockdown.die_with(parent)
    for name in ("zlib", "_bz2", "_lzma"):
        try:
            __import__(name)
        except ImportError:
            continue
    sys.dont_write_bytecode = True
    folders, entries = sandbox_lockdown.library()
    sandbox_lockdown.lock_down(memory=memory, readable=entries, listable=folders, folder=os.getcwd())


def serve(requests: int, replies: int, seed: int) -> None:
    """Run what arrives until the other end is closed."""
    import ast
    import builtins
    import random

    read, write, leave, pack, unpack = os.read, os.write, os._exit, struct.pack, struct.unpack
    parse, build, run, value_of, show, name_of = ast.parse, compile, exec, eval, repr, type
    expression, body_of, failure, join, text = ast.Expr, ast.Expression, describe, bytes.join, str
    streams = sys.stdout, sys.stderr
    system, names, intact = sys, vars(builtins), dict(vars(builtins))
    random.seed(seed)
    world = {"__name__": "__main__", "__builtins__": __builtins__}

    def exactly(count: int) -> bytes:
        parts = []
        while count:
            part = read(requests, count)
            if not part:
                leave(0)
            parts.append(part)
            count -= len(part)
        return join(b"", parts)

    while True:
        nonce, size = unpack(f"<{NONCE}sI", exactly(NONCE + 4))
        code = exactly(size).decode("utf-8", "replace")
        error = ""
        # Code that took these away can be followed by code that needs them.
        names.update(intact)
        system.stdout, system.stderr = streams
        try:
            tree = parse(code, _FILE)
            last = tree.body.pop() if tree.body and name_of(tree.body[-1]) is expression else None
            run(build(tree, _FILE, "exec"), world)
            if last is not None:
                value = value_of(build(body_of(last.value), _FILE, "eval"), world)  # type: ignore[attr-defined]
                if value is not None:
                    world["_"] = value
                    streams[0].write(show(value) + "\n")
                del value
        except BaseException as caught:
            error = failure(caught)
            caught.__traceback__ = None
        system.settrace(None)
        system.setprofile(None)
        for stream in streams:
            stream.flush()
        tail = text(error).encode("utf-8", "replace")[:MAX_ERROR]
        reply = pack(f"<{NONCE}sI", nonce, len(tail)) + tail
        while reply:
            reply = reply[write(replies, reply) :]


def describe(error: BaseException) -> str:
    """Return type, message and the line of the agent's code, such as ``ZeroDivisionError: division by zero (line 2)``.

    A syntax error has its line already.
    """
    try:
        message = str(error)
    except BaseException:
        message = ""
    line = None
    if isinstance(error, SyntaxError):
        message, line = str(error.msg), error.lineno
    else:
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == _FILE:
                line = trace.tb_lineno
            trace = trace.tb_next
    name = type(error).__name__
    said = f"{name}: {message}" if message else name
    return said[: MAX_ERROR // 2] + (f" (line {line})" if line else "")


def main() -> None:
    """Read the command line, confine the process, say what it did, and serve."""
    requests, replies, parent, memory, seed = map(int, sys.argv[1:6])
    words = sandbox_lockdown.support()
    confine(memory, parent)
    hello = "; ".join(words).encode()
    os.write(replies, struct.pack("<I", len(hello)) + hello)
    sys.argv = [""]
    leave = os._exit
    sys.excepthook = lambda *_: leave(1)
    try:
        serve(requests, replies, seed)
    finally:
        leave(1)


if __name__ == "__main__":
    main()
