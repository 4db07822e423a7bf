"""The offline world of language models: functions of Python's standard library.

Documents are functions and small classes, cut out of the source of the installed Python. A
function with a docstring is a chat: its signature and docstring ask, its body answers. The rest is
plain text. Whole files are held out. The rows that ship with the package were made by
`scripts/make_python_data.py` of one Python, so that results do not depend on the installed one.
"""

import ast
import hashlib
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ASKED = "Write this function:\n\n"
MIN_BYTES, MAX_BYTES = 60, 480
MIN_BODY, MAX_HEADER = 16, 350
HELD_OUT_EVERY = 9

NOT_LIBRARY = {
    "__pycache__", "site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo",
    "ensurepip", "pydoc_data", "encodings", "msilib", "_sysconfigdata", "config",
}  # fmt: skip
"""Folders that are no library code, or no code that people write (tables, generated files)."""

OTHER_LICENSES = {"asynchat", "asyncore", "http.cookies", "trace", "uu", "xmlrpc.client"}
"""Modules that Python's own list of licenses names as under another one than the PSF's."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Document(NamedTuple):
    """A function or class.

    Attributes:
        module: The module that it is of.
        header: Signature and docstring of a function; empty for what is plain text.
        body: The rest of it, indented, without a line break at the end.
    """

    module: str
    header: str
    body: str

    @property
    def source(self) -> str:
        """All of it."""
        return f"{self.header}\n{self.body}" if self.header else self.body

    def row(self) -> dict[str, Any]:
        """Return the document as a row of a data set: a chat, or a plain text."""
        if not self.header:
            return {"text": self.body, "module": self.module}
        asked = {"role": "user", "content": ASKED + self.header}
        answer = {"role": "assistant", "content": self.body}
        return {"messages": [asked, answer], "module": self.module}


def header_of(question: str) -> str:
    """Return signature and docstring that a chat asks to complete."""
    return question.removeprefix(ASKED)


def library_files(root: Path | None = None) -> Iterator[tuple[str, Path]]:
    """Yield name and file of the library's modules, in the order of their names.

    Args:
        root: A folder of source files; None is the standard library of this Python.
    """
    folder = root or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if not any(part.startswith(tuple(NOT_LIBRARY)) for part in parts):
            name = ".".join(parts).removesuffix(".__init__")
            if name not in OTHER_LICENSES:
                yield name, path


def is_held_out(module: str) -> bool:
    """Return whether a module's documents are kept from training, by a hash of its name."""
    digest = hashlib.blake2b(module.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_EVERY == 0


def cut(module: str, source: str) -> Iterator[Document]:
    """Yield the documents in a module's source, in its order, none within another.

    A function that is too long gives way to those within it. So does a class, and one with a
    documented function, because that is a chat.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    yield from _within(tree, module, source.splitlines(keepends=True))


def _within(node: ast.AST, module: str, lines: Sequence[str]) -> Iterator[Document]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, DEFINITIONS):
            yield from _within(child, module, lines)
            continue
        inner = list(_within(child, module, lines))
        whole = _document(child, module, lines)
        chats = isinstance(child, ast.ClassDef) and any(found.header for found in inner)
        if whole is None or chats:
            yield from inner
        else:
            yield whole


def _document(
    node: Definition | ast.ClassDef, module: str, lines: Sequence[str]
) -> Document | None:
    """Return a definition as a document, None where it does not fit."""
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    source = textwrap.dedent("".join(lines[start - 1 : node.end_lineno])).rstrip()
    size = len(source.encode())
    if not MIN_BYTES <= size <= MAX_BYTES or "\t" in source or not parses(source):
        return None
    if isinstance(node, ast.ClassDef) or ast.get_docstring(node) is None:
        return Document(module, "", source)
    docstring = node.body[0].end_lineno
    if docstring is None or len(node.body) == 1 or node.body[1].lineno == docstring:
        return Document(module, "", source)
    rows = source.splitlines()
    header = "\n".join(rows[: docstring - start + 1])
    body = "\n".join(rows[docstring - start + 1 :]).strip("\n").rstrip()
    fits = len(header.encode()) <= MAX_HEADER and len(body.encode()) >= MIN_BODY
    if not fits or not parses(f"{header}\n{body}"):
        return Document(module, "", source)
    return Document(module, header, body)


def parses(source: str) -> bool:
    """Return whether a text is Python."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def completes(question: str, answer: str) -> bool:
    """Return whether an answer is a body of the function that was asked for, and nothing else."""
    source = f"{header_of(question)}\n{answer}"
    return bool(answer.strip()) and parses(source) and len(ast.parse(source).body) == 1


def corpus(files: Iterable[tuple[str, Path]]) -> tuple[list[Document], list[Document]]:
    """Return the documents for training and the held-out ones, none of them twice.

    What is in both is not held out: the same small methods are in many files.
    """
    kept: dict[bool, dict[str, Document]] = {False: {}, True: {}}
    for module, path in files:
        source = path.read_text(encoding="utf-8", errors="replace")
        for document in cut(module, source):
            known = " ".join(document.source.split())
            kept[is_held_out(module)].setdefault(known, document)
    train, held_out = kept[False], kept[True]
    return list(train.values()), [d for known, d in held_out.items() if known not in train]
