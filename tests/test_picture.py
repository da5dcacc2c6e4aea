"""The picture of the rooms shows those that exist, and is drawn from the script as it is."""

from __future__ import annotations

from pathlib import Path

from docs.mkdocs.picture import FILE, FLOORS, FLOWS, draw

PACKAGE = Path(__file__).parents[1] / "dsv4_convert"


def test_it_shows_every_room_once() -> None:
    shown = [room for floor in FLOORS for room in floor]
    assert sorted(shown) == sorted({path.parent.name for path in PACKAGE.glob("*/*.py")})


def test_flows_pass_through_rooms() -> None:
    rooms = {room for floor in FLOORS for room in floor}
    assert {room.split("/")[0] for steps in FLOWS.values() for room, _ in steps} <= rooms


def test_the_file_is_what_the_script_draws() -> None:
    assert FILE.read_text(encoding="utf-8") == draw()
