"""What Triton's interpreter needs, in the processes that have it on (`interpreted*.py`)."""

import os

import pytest


@pytest.fixture(autouse=True)
def _loop_bounds_are_integers(monkeypatch):
    """The interpreter of Triton 3.6 makes loop bounds with int() of an array of one element; numpy 2.4 refuses that."""
    if not os.environ.get("TRITON_INTERPRET"):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_with_index)
