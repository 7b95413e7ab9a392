"""Methods whose code lies in another module, which is imported when one of them is first used.

So a backend can say what it takes without importing torch, and computes without any detour: the
first use puts the function in the place of its announcement, where it is a method like any other.
"""

from __future__ import annotations

from importlib import import_module
from types import MethodType
from typing import Any


class _Announced:
    """Stands in a class for a method until that is first used, from an instance or by `super`."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name

    def __get__(self, instance: object | None, owner: type) -> Any:
        if instance is None:
            return self  # `abc` looks at it while the class is being made
        function = getattr(import_module(self._module), self._name)
        setattr(self._owner, self._name, function)
        return MethodType(function, instance)

    def __call__(self, instance: object, *arguments: Any, **named: Any) -> Any:
        """``Class.method(instance, ...)`` before the first use."""
        return self.__get__(instance, type(instance))(*arguments, **named)


def computed_in(module: str) -> Any:
    """A method of the class that this is assigned in: the function of the same name in `module`.

    Its first parameter is the instance. A class that derives from this one overrides the method and
    calls it with `super` as it would any other.
    """
    return _Announced(module)
