"""`Wording`: errors of native calls, put into the words of one of DeepEP's dialects. Other calls pay nothing for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tokenferry.compat.deep_ep.views import Views
from tokenferry.errors import ShapeError, TokenferryError

_NATIVE = "redispatch|dispatch|combine|decode_dispatch|decode_combine"
_CALL = re.compile(rf"(^|: )({_NATIVE})((?: \([^)]*\))?(?: #\d+)?: )")
_LATEST = re.compile(rf"( in )({_NATIVE})(?= #)")
_LOCAL = re.compile(r"^(?:MoeShape|for_shape|mask|synchronize|ExpertGroup): ")
_ARGUMENT = re.compile(r"[a-z_]+(?:\.[a-z_]+)?(?:\[\d\])?(?=: | is |=)|[a-z_]+(?=\[)")
_SET_BY = re.compile(r"(\w+)=(\d+) was set by (the plan(?: \(R \* M\))?|the group|[\w.]+(?:\[\d\])?)")
_DIFFERS = re.compile(
    r"made different calls: (.{1,99}?) is (.{1,60}?) on rank (\d+) and (.{1,60}?) on rank (\d+); it has to be the same "
    r"on all ranks"
)
_CALLED = re.compile(rf"rank (\d+) called ({_NATIVE}|capacity_check); call the same")
_TERM = re.compile(r"^ExpertGroup: (.+) differs between ranks \((.+)\); give")
_NO_COLUMNS = re.compile(r"^MoeShape: (top_k|hidden): expected a positive integer, got 0")
_PHRASES = {
    "whose plan says": "whose handle says",
    "use plans of the same dispatch": "pass handles of the same dispatch",
    "use the group that dispatched": "use the buffer that dispatched",
    "call the hook() of its decode_dispatch first": "call the hook of its dispatch first",
    "make a new ExpertGroup": "make a new buffer",
}


@dataclass(frozen=True, slots=True)
class Field:
    """Something that ranks compare.

    Attributes:
        name: DeepEP's name for it.
        values: Words for some of its values.
        on_gpu: What it is on GPUs; empty: ``name``.
    """

    name: str
    values: Mapping[str, str] = field(default_factory=dict)
    on_gpu: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """A native call that a method makes by itself, such as to exchange counts.

    Attributes:
        name: The method.
        done: What a rank did that makes it, such as "called ElasticBuffer.barrier".
        fields: By R, what ranks compare of it, as far as the program does not decide it.
        differs: What differs between two ranks that both make it, by the native labels.
    """

    name: str
    done: str
    fields: Callable[[int], Mapping[str, object]]
    differs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Method:
    """A native call in the words of a dialect.

    Attributes:
        name: The method of DeepEP that makes it.
        arguments: DeepEP's names for its arguments.
        fields: What ranks compare, by the native labels.
        called: What another rank may have called, if it made this call; empty: ``name``.
        steps: Native calls of this kind that other methods make by themselves.
    """

    name: str
    arguments: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Field] = field(default_factory=dict)
    called: str = ""
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class Wording:
    """The words of a dialect.

    Attributes:
        methods: By the names of native calls.
        rows: The argument that holds rows.
    """

    methods: Mapping[str, Method]
    rows: str = "x"

    def put(
        self,
        error: TokenferryError,
        call: str,
        views: Views,
        step: Step | None = None,
        *,
        num_experts: int = 0,
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        """Rewrite the message of an error, to be raised again; a message in words of the dialect stays as it is.

        Args:
            error: The error of a native call. On GPUs it may be that of an earlier one.
            call: The method of DeepEP, for errors that name none.
            views: Views of the group.
            step: The step of the method, on CPUs, where the error is certainly that of this call.
            num_experts: E of a dispatch.
            renamed: More native names, and those of the arguments.

        Raises:
            ShapeError: instead, if a tensor has no columns.
        """
        if not error.args:
            return
        text = str(error.args[0])
        empty = _NO_COLUMNS.match(text)
        if empty:
            name = "topk_idx" if empty[1] == "top_k" else self.rows
            raise ShapeError(f"{call}: {name}: expected at least one column, got none") from None
        step = None if views.on_gpu or "the cause: " in text else step
        text = _DIFFERS.sub(lambda found: self._difference(found, views, step, num_experts), text)
        text = _CALLED.sub(lambda found: f"rank {found[1]} called {self._called(found[2])}; call the same", text)
        native = _CALL.match(text)
        if native:
            names = {**self._method(native[2]).arguments, **(renamed or {})}
            text = native[0] + _renamed(text[native.end() :], names)
            text = _SET_BY.sub(lambda found: self._source(found, names), text)
            if step is not None:
                text = f"{step.name}{native[3]}{text[native.end() :]}"
        elif _LOCAL.match(text):
            text = f"{call}: {_renamed(_LOCAL.sub('', text), renamed or {})}"
        text = _CALL.sub(lambda found: f"{found[1]}{self._method(found[2]).name}{found[3]}", text)
        text = _LATEST.sub(lambda found: f"{found[1]}{self._method(found[2]).name}", text)
        for ours, theirs in _PHRASES.items():
            text = text.replace(ours, theirs)
        error.args = (text, *error.args[1:])

    def _method(self, native: str) -> Method:
        """Return the words for a native call; one that this dialect never makes, but a rank with another one, as is."""
        return self.methods.get(native) or Method(native)

    def _called(self, native: str) -> str:
        method = self._method("dispatch" if native == "capacity_check" else native)
        return method.called or method.name

    def _source(self, found: re.Match[str], names: Mapping[str, str]) -> str:
        letter, size, source = found.groups()
        if source.startswith("the plan"):
            source = "the handle"
        elif source == "the group":
            source = {"K": "topk_idx", "H": self.rows}.get(letter, source)
        return f"{letter}={size} was set by {names.get(source, source)}"

    def _difference(self, found: re.Match[str], views: Views, step: Step | None, num_experts: int) -> str:
        """Return which arguments of two ranks differ, or which of them made a call that the other one did not."""
        label, one, rank, other, peer = found.groups()
        num_ranks = views.group.num_ranks
        start, same = "made different calls", "call the same on all ranks, in the same order"
        if step is not None and label in step.differs:
            return f"{start}: {step.differs[label]} differs; it has to be the same on all ranks"
        if step is not None and label in step.fields(num_ranks):
            return f"{start}: rank {rank} {step.done}, and rank {peer} did not; {same}"
        calls = _CALL.findall(found.string[: found.start()])
        method = self._method(calls[-1][1] if calls else "")
        known = method.fields.get(label, Field(label))
        ranks = {rank: one, peer: other}
        shown = [known.values.get(value, value) for value in ranks.values()]
        # Values may be those of a step. On CPUs the error is of this call, which takes none; and since steps have R
        # experts, and numbers of experts are compared first, the other rank has taken none either if E is not R.
        certain = "" if views.on_gpu else str(views.rank)
        steps = method.steps if views.on_gpu or label == "num_experts" or num_experts == num_ranks else ()
        perhaps = "".join(
            f", or rank {one} {each.done}"
            for one, value in ranks.items()
            for each in steps
            if one != certain and str(each.fields(num_ranks).get(label)) == value
        )
        name = known.on_gpu if known.on_gpu and views.on_gpu else known.name
        differs = f"{name} is {shown[0]} on rank {rank} and {shown[1]} on rank {peer}{perhaps}"
        return f"{start}: {differs}; it has to be the same on all ranks"


def put_term(error: TokenferryError, owner: str, names: Mapping[str, Field]) -> None:
    """Change the message of an error of the constructor of a group, whose owner has arguments of other names."""
    if not error.args:
        return
    text = str(error.args[0])
    term = _TERM.match(text)
    if term and term[1] in names:
        known = names[term[1]]
        per_rank = (one.partition(": ") for one in term[2].split(", "))
        shown = ", ".join(f"{rank}: {known.values.get(value, value)}" for rank, _, value in per_rank)
        text = f"ExpertGroup: {known.name} differs between ranks ({shown}); give all ranks the same"
    error.args = (_LOCAL.sub(f"{owner}: ", text), *error.args[1:])


def _renamed(text: str, names: Mapping[str, str]) -> str:
    """Return the rest of a message, which begins with the name of an argument, with DeepEP's name for it."""
    found = _ARGUMENT.match(text)
    if found is None or found[0] not in names:
        return text
    return names[found[0]] + text[found.end() :]
