"""What a forked child is told about the objects of its parent."""

import gc
import os
import weakref

import pytest

from support.children import in_child
from tokenferry.forked import forget_in_child, owner, reason


class Thing:
    """Something that a child must not use."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []


def fail(thing: Thing, why: str) -> None:
    raise OSError("a descriptor is gone")


def remember(thing: Thing, why: str) -> None:
    thing.forgotten.append(why)


def test_a_child_forgets_what_its_parent_made():
    things = Thing(), Thing(), Thing()
    forget_in_child(things[0], remember)
    forget_in_child(things[1], fail)
    forget_in_child(things[2], remember)
    parent = os.getpid()
    found = in_child(lambda: [thing.forgotten for thing in things] + [owner(things[2]), os.getpid()])
    (first,), second, (third,), made_by, child = found
    assert first == third
    assert second == []
    assert str(parent) in first
    assert str(child) in first
    assert "'spawn'" in first
    assert made_by == parent
    assert [thing.forgotten for thing in things] == [[], [], []], "this process forgot something"
    assert reason(parent).startswith(f"belongs to process {parent}, ")


def test_a_child_keeps_what_it_made_itself():
    def make() -> list[object]:
        thing = Thing()
        forget_in_child(thing, remember)
        return [thing.forgotten, owner(thing) == os.getpid()]

    forget_in_child(Thing(), remember)
    assert in_child(make) == [[], True]


def test_a_child_of_a_child_forgets_too():
    thing = Thing()
    forget_in_child(thing, remember)
    assert in_child(lambda: len(in_child(lambda: thing.forgotten))) == 2


def test_an_object_without_a_function_has_an_owner():
    thing = Thing()
    assert owner(thing) is None
    forget_in_child(thing)
    assert owner(thing) == os.getpid()
    assert in_child(lambda: owner(thing)) == os.getpid()


@pytest.mark.parametrize("forget", [None, remember])
def test_nothing_is_kept_alive(forget):
    from tokenferry import forked

    thing = Thing()
    forget_in_child(thing, forget)
    assert thing in forked._owned
    alive = weakref.ref(thing)
    del thing
    gc.collect()
    assert alive() is None
