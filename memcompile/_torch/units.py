"""Private torch that compiling needs: how Inductor's C++ kernels become functions.

Checked by running on torch 2.13.0. Inductor compiles each kernel by itself, and nearly all of that
is headers: 27 kernels of a step with loops take 17.6 s one by one and 1.8 s as one unit. Loops have
about twice the kernels of the step without.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.exc import CppCompileError

__all__ = ["AsyncCompile", "CppCompileError", "CppPythonBindingsCodeCache", "whole_units"]

#: Kernels of one unit, at most; units are compiled side by side.
MOST = 16
#: A kernel's source that can stand beside others: one function behind headers.
ALONE = re.compile(
    r"(?P<headers>(?:\s*#(?:include|pragma)[^\n]*\n)*)"
    r'(?P<start>\s*extern "C"\s+void\s+)kernel(?P<rest>\(.*)',
    re.DOTALL,
)


@contextlib.contextmanager
def whole_units() -> Iterator[None]:
    """Within the block, the C++ kernels of a graph are compiled together."""
    binding = Binding.of(getattr(CppPythonBindingsCodeCache, "suffix_template", ""))
    if binding is None:
        yield
        return
    found: weakref.WeakKeyDictionary[Any, list[Kernel]] = weakref.WeakKeyDictionary()
    one, wait = AsyncCompile.cpp_pybinding, AsyncCompile.wait

    def cpp_pybinding(self: Any, argtypes: list[str], source_code: str) -> Any:
        if not ALONE.fullmatch(source_code) or source_code.count('extern "C"') > 1:
            return one(self, argtypes, source_code)
        kernel = Kernel(argtypes, source_code)
        found.setdefault(self, []).append(kernel)
        return kernel

    def wait_for_all(self: Any, scope: dict[str, Any]) -> None:
        kernels = found.pop(self, [])
        units = [kernels[at : at + MOST] for at in range(0, len(kernels), MOST)]
        started = [(unit, _start(self, unit, binding)) for unit in units if len(unit) > 1]
        made: dict[int, Any] = {}
        for unit, get in started:
            with contextlib.suppress(CppCompileError):  # then each by itself
                module = get()
                made |= {id(each): getattr(module, f"kernel_{at}") for at, each in enumerate(unit)}
        for name, value in list(scope.items()):
            if isinstance(value, Kernel):
                if id(value) not in made:
                    made[id(value)] = one(self, value.argtypes, value.source)
                scope[name] = made[id(value)]
        wait(self, scope)

    with (
        mock.patch.object(AsyncCompile, "cpp_pybinding", cpp_pybinding),
        mock.patch.object(AsyncCompile, "wait", wait_for_all),
    ):
        yield


class Kernel:
    """What stands for a kernel until it is compiled."""

    def __init__(self, argtypes: Sequence[str], source: str) -> None:
        self.argtypes, self.source = argtypes, source


class Binding:
    """Inductor's text that makes a Python module of one function, for several."""

    def __init__(self, head: str, function: str, row: str, tail: tuple[str, str]) -> None:
        self.head, self.function, self.row, self.tail = head, function, row, tail

    @classmethod
    def of(cls, template: str) -> Binding | None:
        """By the text for one; ``None`` where that is not as it is known."""
        head, start, rest = template.partition("static PyObject* {entry_func}_py(")
        function, table, rest = rest.partition("static PyMethodDef py_methods[] = {{")
        row, comma, rest = rest.partition(",\n    {{NULL, NULL, 0, NULL}}}};")
        if not (start and table and comma):
            return None
        return cls(head, start + function, row, (table, comma + rest))

    def text(self, kernels: Sequence[Kernel]) -> str:
        """Functions ``kernel_0``, ``kernel_1`` ... as methods of a module ``kernel``."""
        cache = CppPythonBindingsCodeCache
        fields = {"entry_func": cache.entry_function, "extra_parse_arg": ""}
        parts, rows = [], []
        for at, kernel in enumerate(kernels):
            name = f"kernel_{at}"
            given = ", ".join(
                f"parse_arg<{kind.replace('const ', '')}>(args, {n})"
                for n, kind in enumerate(kernel.argtypes)
            )
            call = f"{name}({given}); Py_RETURN_NONE;"
            own = {"entry_func": name, "arg_len": len(kernel.argtypes), "call_entry_func": call}
            parts.append(self.function.format(**own))
            rows.append(self.row.format(**own))
        table, rest = self.tail
        parts += [table.format(), ",".join(rows), rest.format(**fields)]
        return "".join([self.head.format(**fields), *parts])


def _start(compiler: Any, kernels: Sequence[Kernel], binding: Binding) -> Callable[[], Any]:
    """Begin to compile kernels as one unit; what gives their module."""
    sources = []
    for at, kernel in enumerate(kernels):
        matched = ALONE.fullmatch(kernel.source)
        assert matched is not None
        sources.append(f"{matched['headers']}{matched['start']}kernel_{at}{matched['rest']}")
    submit = compiler.submit if get_compile_threads() > 1 else None
    text = "\n".join([*sources, binding.text(kernels)])
    get: Callable[[], Any] = CppPythonBindingsCodeCache.load_async(text, submit_fn=submit)
    return get
