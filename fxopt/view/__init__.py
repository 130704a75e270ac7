"""What happened while a model was compiled, and why not: the recorder, the report and its forms.

The package can be called: `fxopt.view(model, x)` is `fxopt.view.show.view(model, x)`.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from fxopt.view.show import view

        return view(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
