"""The picture of the rooms says what the table of dependencies says, and is drawn from the script as it is."""

from __future__ import annotations

from docs.mkdocs.picture import FILE, FLOORS, FLOWS, draw
from tests.test_dependencies import ALLOWED

#: Plain modules and what is no room of the house.
NO_ROOMS = {"root", "package", "pytest_plugin", "platforms"}


def test_it_shows_every_room_once() -> None:
    shown = [room for floor in FLOORS for room in floor]
    assert sorted(shown) == sorted(ALLOWED.keys() - NO_ROOMS)


def test_imports_stay_on_their_floor_or_point_downwards() -> None:
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    for room, number in floor_of.items():
        for target in set(ALLOWED[room].split()) - NO_ROOMS:
            assert floor_of[target] >= number, f"{room} imports {target}, which is drawn above it"


def test_flows_pass_through_rooms() -> None:
    rooms = {room for floor in FLOORS for room in floor}
    assert {room.split("/")[0] for steps in FLOWS.values() for room, _ in steps} <= rooms


def test_the_file_is_what_the_script_draws() -> None:
    assert FILE.read_text(encoding="utf-8") == draw()
