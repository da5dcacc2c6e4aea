"""All bad inputs: what each id means, the cases of each, and where a test of another kind has it."""

from __future__ import annotations

import dataclasses

from .case import Case
from .configs import CONFIGS
from .files import FILES
from .goldens import GOLDENS
from .headers import HEADERS
from .indexes import INDEXES
from .network import NETWORK
from .outputs import OUTPUTS
from .tensors import TENSORS

#: Every kind of bad input that is known. A case has one of these ids.
IDS: dict[str, str] = {
    "F01": "a file of 0 bytes",
    "F02": "a file too short for the length of its header",
    "F03": "a header longer than its file",
    "F04": "a header of 2^63 bytes",
    "F05": "a header beyond 100 MB",
    "F06": "a header that is not UTF-8",
    "F07": "a header that is not JSON",
    "F08": "a header that begins with a space",
    "F09": "a header that is an array",
    "F10": "a header nested deeply",
    "F11": "a Git LFS pointer",
    "F12": "an error page or answer",
    "F13": "an archive or a pickle under another name",
    "F14": "a folder",
    "F15": "a file that may not be read",
    "F16": "a named pipe or device",
    "F17": "a link to itself",
    "F18": "a link to nothing or out of the folder",
    "F19": "a file that was cut off",
    "F20": "bytes after the end",
    "F21": "a flipped bit",
    "F22": "a file that changes while it is read",
    "F23": "a file of zeros",
    "H01": "a key that is there twice",
    "H02": "tensors that overlap",
    "H03": "a hole between tensors",
    "H04": "negative numbers",
    "H05": "an offset past the end",
    "H06": "a tensor that ends before it begins",
    "H07": "a shape that its bytes do not fit",
    "H08": "a size that overflows",
    "H09": "an unknown dtype",
    "H10": "names that are hostile or look alike",
    "H11": "a tensor of no elements",
    "H12": "a scalar",
    "H13": "an odd number of packed elements",
    "H14": "extents that are no integers",
    "H15": "metadata that are no strings",
    "H16": "another order of bytes, another alignment",
    "I01": "a shard outside of the folder",
    "I02": "an absolute path",
    "I03": "backslashes, drives",
    "I04": "a URL",
    "I05": "a shard that is missing",
    "I06": "a shard too many",
    "I07": "a tensor of the index that is in no shard",
    "I08": "a tensor that is not in the index",
    "I09": "a tensor in two shards",
    "I10": "a tensor in another shard",
    "I11": "a wrong total size",
    "I12": "shards without an index",
    "I13": "shards of several revisions",
    "I14": "an index that is none",
    "I15": "a download that was cut off",
    "C01": "a field that is missing",
    "C02": "a field that nobody knows",
    "C03": "another model",
    "C04": "sizes that are not those of the tensors",
    "C05": "a schedule of another length",
    "C06": "quantisation that is not described, or is another one",
    "C07": "NaN and infinity",
    "C08": "the config of another size of the model",
    "C09": "stages after the backbone that are declared and absent",
    "T01": "a tensor that is missing",
    "T02": "a tensor too many",
    "T03": "an expert that is missing",
    "T04": "a scale that is missing",
    "T05": "a scale without its weight",
    "T06": "a scale of another shape",
    "T07": "a scale of another dtype",
    "T08": "a scale that is zero, no number, or huge",
    "T09": "a weight that is no number",
    "T10": "a weight of zeros",
    "T11": "a square matrix transposed",
    "T12": "gate and up exchanged",
    "T13": "experts or layers exchanged",
    "T14": "a weight of another dtype",
    "T15": "the nibbles of FP4 in the other order",
    "T16": "widths that blocks do not divide",
    "T17": "a hash table that leads to no expert, or of another dtype",
    "T18": "a router bias that is missing",
    "T19": "a value that the result cannot hold",
    "T20": "denormal numbers and negative zeros, which are kept",
    "O01": "something is at the destination",
    "O02": "a finished conversion is at the destination",
    "O03": "what an interrupted run left",
    "O04": "a disk that becomes full",
    "O05": "a destination that may not be written",
    "O06": "SIGKILL at any moment",
    "O07": "SIGINT and SIGTERM",
    "O08": "two runs at once",
    "O09": "a disk or quota that fails",
    "O10": "a destination without renames",
    "O11": "too little memory",
    "O12": "clocks that are wrong",
    "O13": "paths that are odd or too long",
    "O14": "a converted checkpoint that was damaged",
    "O15": "a converted checkpoint of another shape or dtype, which Orbax restores",
    "O16": "a word in a conversion's records that dsv4 does not know",
    "O17": "what lies beside a checkpoint's own files",
    "N01": "401, 403 and 404",
    "N02": "429 and 5xx, for a while and for ever",
    "N03": "a server that stalls",
    "N04": "a connection that breaks in a shard",
    "N05": "a repository that changed since",
    "N06": "the right size and a wrong hash",
    "N07": "offline",
    "N08": "the token, which goes nowhere else",
    "N09": "a disk that is too small, known before the start",
    "N10": "hostile names in the listing of a repository",
    "N11": "a Hub that answers otherwise than the Hub",
    "N12": "answers without an end, in bytes or in time",
    "P01": "a golden of another model",
    "P02": "a golden with a hole",
    "P03": "NaN, which equals nothing",
    "P04": "infinities",
    "P05": "a shape that would broadcast",
    "P06": "a tap without elements",
    "P07": "nothing compared",
    "P08": "ties of choices",
    "P09": "a reference of zeros",
    "P10": "recording that changes results",
    "P11": "padding",
    "P12": "faults of the model, each named at its place",
    "P14": "noise floors that no rounding gives",
    "P13": "a word in a golden's records that dsv4 does not know",
}


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """A test that has an id, beside the cases or in their stead, and why it is not a case."""

    id: str
    test: str
    why: str


ELSEWHERE: tuple[Elsewhere, ...] = (
    Elsewhere(
        "O04",
        "tests/store/test_writer.py::test_a_full_disk_is_a_resource_error_that_can_be_resumed",
        "writes must fail",
    ),
    Elsewhere(
        "O06",
        "tests/convert/test_resume.py::test_killed_processes_are_continued_to_identical_bytes",
        "kills processes",
    ),
    Elsewhere("O07", "tests/cli/test_commands.py::test_an_interrupt_says_how_to_go_on", "sends signals"),
    Elsewhere(
        "O09",
        "tests/store/test_writer.py::test_when_overwriting_stops_between_the_renames_the_old_checkpoint_comes_back",
        "writes must fail",
    ),
    Elsewhere("O10", "tests/convert/test_bucket.py::test_from_bucket_to_bucket", "needs a file system in memory"),
    Elsewhere("P08", "tests/parity/test_run.py::test_a_tie_is_reported_and_followed", "a tie is made, not an input"),
    Elsewhere(
        "P03", "tests/parity/test_comparisons.py::test_nan_and_unequal_infinity_fail", "NaN on both sides at once"
    ),
    Elsewhere(
        "P04", "tests/parity/test_comparisons.py::test_the_same_infinity_passes", "infinity on both sides at once"
    ),
    Elsewhere(
        "P10",
        "tests/model/test_structure.py::test_recording_changes_no_bit_and_records_every_tap",
        "a property of the model",
    ),
    Elsewhere("N11", "tests/checkpoint/test_hub_answers.py::test_an_odd_answer_is_one_error", "all shapes"),
    Elsewhere("N12", "tests/files/test_remote.py::test_bytes_and_time_are_bounded", "a golden behind a URL"),
    Elsewhere("P12", "tests/parity/test_faults.py::test_a_planted_fault_is_named", "a catalogue of its own"),
)

AREAS: dict[str, tuple[Case, ...]] = {
    "files": FILES,
    "headers": HEADERS,
    "indexes": INDEXES,
    "configs": CONFIGS,
    "tensors": TENSORS,
    "outputs": OUTPUTS,
    "network": NETWORK,
    "goldens": GOLDENS,
}

CATALOGUE: dict[str, Case] = {case.name: case for cases in AREAS.values() for case in cases}
assert len(CATALOGUE) == sum(map(len, AREAS.values())), "names are unique, because tests and the benchmark go by them"
