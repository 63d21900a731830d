"""The public interface keeps its promises of form."""

import importlib
import inspect

import pytest

import advjax

MODULES = (
    "attacks",
    "data",
    "lipschitz",
    "losses",
    "metrics",
    "models",
    "plots",
    "runner",
    "solvers",
    "training",
    "transfer",
    "units",
)


def public_names(module):
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return [(name, getattr(module, name)) for name in names]


PUBLIC = [
    pytest.param(value, id=f"{module}.{name}")
    for module in MODULES
    for name, value in public_names(importlib.import_module(f"advjax.{module}"))
    if inspect.isclass(value) or inspect.isfunction(value)
]
FUNCTIONS = [param for param in PUBLIC if inspect.isfunction(param.values[0])]


def test_everything_is_reached_from_the_package():
    for module in MODULES:
        importlib.import_module(f"advjax.{module}")
        assert inspect.ismodule(getattr(advjax, module))
    assert set(advjax.__all__) == {*MODULES, "Box", "LogitsFn", "__version__"}


@pytest.mark.parametrize("thing", PUBLIC)
def test_everything_public_is_documented(thing):
    assert inspect.getdoc(thing)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_say_what_goes_in_and_what_comes_out(function):
    doc = inspect.getdoc(function)
    first = doc.splitlines()[0]
    assert first.endswith("."), "a docstring begins with one sentence"
    parameters = inspect.signature(function).parameters.values()
    for parameter in parameters:
        assert f"{parameter.name}: " in doc, f"{parameter.name} is not documented"
    assert "Returns:" in doc or function.__annotations__["return"] is None


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_are_annotated(function):
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty


@pytest.mark.parametrize("function", FUNCTIONS)
def test_options_are_keywords(function):
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is not inspect.Parameter.empty:
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, parameter.name
