"""Names of things that load late: name -> "module:attribute", plus other people's packages.

A registry holds strings, so listing what there is imports nothing heavy; the module is imported
when its thing is asked for. A package outside loralab adds its own by an entry point:

    [project.entry-points."loralab.tasks"]
    riddles = "their_package.riddles:Riddles"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from loralab.errors import UserError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


class Registry:
    """Lazy things of one kind.

    kind: the word for one of them in messages ("task").
    group: the entry-point group where other packages add theirs. A built-in name always means
        the built-in, so that installing a package never changes what a config does.
    builtin: name -> "module:attribute".
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = group
        self.builtin = MappingProxyType(dict(builtin))

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        from importlib.metadata import entry_points

        return {point.name: point for point in entry_points(group=self.group)}

    def names(self) -> list[str]:
        """All known names, sorted."""
        return sorted({*self.builtin, *self._entry_points})

    def target(self, name: str) -> str:
        """The "module:attribute" behind a name.

        Raises:
            UserError: the name is unknown; says which are known and which is closest.
        """
        if name in self.builtin:
            return self.builtin[name]
        if name in self._entry_points:
            return self._entry_points[name].value
        raise UserError(f"unknown {self.kind} {name!r}: {choose(name, self.names())}")

    def load(self, name: str) -> Any:
        """The thing itself, its module imported now.

        Raises:
            UserError: the name is unknown, or a package's entry point cannot be imported.
        """
        target = self.target(name)
        if name in self.builtin:
            return _resolve(target)
        try:
            return _resolve(target)
        except Exception as error:
            raise UserError(
                f"{self.kind} {name!r} ({target}, added by entry point {self.group}) cannot be "
                f"imported: {type(error).__name__}: {_one_line(error)}"
            ) from error

    def create(self, name: str, options: Mapping[str, Any]) -> Any:
        """Call the thing with options, checked against its signature and type hints.

        Raises:
            UserError: the name or an option is unknown, an option is missing, or a value has
                the wrong type.
        """
        factory = self.load(name)
        return factory(**_checked(f"{self.kind} {name!r}", factory, options))


def choose(name: str, known: Iterable[str]) -> str:
    """What to say beside an unknown name: the closest known one, then all of them."""
    from difflib import get_close_matches

    known = sorted(known)
    if not known:
        return "there are none"
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def _resolve(target: str) -> Any:
    module, _, attribute = target.partition(":")
    found: Any = import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _checked(what: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as the factory's type hints ask for them ("3" becomes 3 for an int)."""
    import inspect

    from pydantic import TypeAdapter, ValidationError

    parameters = inspect.signature(factory, eval_str=True).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = {n: p for n, p in parameters.items() if p.kind in by_name}
    checked: dict[str, Any] = {}
    for option, value in options.items():
        if option not in named and not takes_any:
            raise UserError(f"{what} has no option {option!r}: {choose(option, named)}")
        parameter = named.get(option)
        if parameter is None or parameter.annotation is parameter.empty:
            checked[option] = value
            continue
        try:
            checked[option] = TypeAdapter(parameter.annotation).validate_python(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise UserError(f"{what}: option {option} is {value!r}: {first['msg']}") from error
    missing = [n for n, p in named.items() if p.default is p.empty and n not in checked]
    if missing:
        raise UserError(f"{what} needs option {missing[0]!r}")
    return checked


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


TASKS = Registry(
    "task",
    "loralab.tasks",
    {
        "conciseness": "loralab.tasks.conciseness:Conciseness",
        "countdown": "loralab.tasks.countdown:Countdown",
        "choice": "loralab.tasks.choice:Choice",
        "gsm8k": "loralab.tasks.gsm8k:GSM8K",
        "humaneval": "loralab.tasks.code:HumanEval",
        "mbpp": "loralab.tasks.code:MBPP",
        "samsum": "loralab.tasks.dialogue:Dialogue",
        "sst2": "loralab.tasks.sentiment:Sentiment",
        "supervised": "loralab.tasks.supervised:Supervised",
        "text": "loralab.tasks.text:Text",
    },
)

INITS = Registry(
    "initialisation",
    "loralab.inits",
    {
        "zero_b": "loralab.adapters.inits.blind:ZeroB",
        "tiny": "loralab.adapters.inits.blind:Tiny",
        "random": "loralab.adapters.inits.blind:Random",
        "orthogonal": "loralab.adapters.inits.blind:Orthogonal",
        "orthogonal_negative": "loralab.adapters.inits.blind:OrthogonalNegative",
        "svd_delta": "loralab.adapters.inits.fitted:SvdDelta",
        "output_match": "loralab.adapters.inits.fitted:OutputMatch",
        "quantization_match": "loralab.adapters.inits.fitted:QuantizationMatch",
        "loftq": "loralab.adapters.inits.fitted:LoftQ",
        "warm_start": "loralab.gradient.warm_start:WarmStart",
        "progressive": "loralab.adapters.inits.progressive:Progressive",
        "pissa": "loralab.adapters.inits.peft_own:Pissa",
        "olora": "loralab.adapters.inits.peft_own:Olora",
        "eva": "loralab.adapters.inits.peft_own:Eva",
        "corda": "loralab.adapters.inits.peft_own:Corda",
        "lora_ga": "loralab.adapters.inits.peft_own:LoraGA",
        "gaussian": "loralab.adapters.inits.peft_own:Gaussian",
        "mica": "loralab.adapters.inits.peft_own:Mica",
    },
)

PROBES = Registry(
    "probe",
    "loralab.probes",
    {
        "text": "loralab.health.text:TextProbe",
        "divergence": "loralab.health.divergence:DivergenceProbe",
        "own_divergence": "loralab.health.divergence:OwnDivergenceProbe",
        "token_classes": "loralab.health.token_classes:TokenClassProbe",
        "weights": "loralab.health.weights:WeightProbe",
        "parity": "loralab.health.parity:ParityProbe",
        "data": "loralab.health.data:DataProbe",
        "canaries": "loralab.health.canaries:CanaryProbe",
    },
)
