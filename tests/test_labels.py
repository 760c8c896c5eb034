"""Declared labels: every form of declaration, encoding and decoding, and errors whose YAML really is the fix."""

from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from segmentation.data.labels import IGNORE_INDEX, Labels
from segmentation.errors import InputError

NUCLEI = {"background": 0, "nucleus": 255}


def rgb(*colors: str) -> np.ndarray:
    """One row of pixels of these colours."""
    return np.array([[list(bytes.fromhex(color)) for color in colors]], np.uint8)


def suggestions(message: str) -> list[dict[str, Any]]:
    """The remedies of a message, parsed as the YAML that a user would paste."""
    _, fix = message.split(" Fix: ")
    return [yaml.safe_load("{" + remedy + "}") for remedy in fix.split(", or, if they count nowhere, ")]


def test_every_form_of_a_class() -> None:
    labels = Labels.parse(
        {"sky": 3, "road": [7, 9], "car": {"value": [1], "color": "#0a0B0c"}, "tree": {"value": 4}}, ignore=[255, 254]
    )
    assert (labels.task, labels.num_classes, labels.num_outputs, labels.by_color) == ("multiclass", 4, 4, False)
    assert labels.names == ["sky", "road", "car", "tree"]
    assert labels.palette.shape == (4, 3)
    assert labels.palette[2].tolist() == [10, 11, 12]
    assert len({tuple(color) for color in labels.palette}) == 4
    mask = np.array([[3, 9, 7], [1, 4, 254]], np.uint8)
    assert labels.encode(mask, "m.png").tolist() == [[0, 1, 1], [2, 3, IGNORE_INDEX]]


def test_color_masks() -> None:
    labels = Labels.parse({"road": ["#804080", "#000000"], "car": {"value": "#40ff80", "color": "#123456"}}, "#FFFFFF")
    assert labels.by_color
    assert labels.colors == ["#804080", "#123456"]  # its own colour, unless another is declared to display
    mask = rgb("000000", "804080", "40FF80", "FFFFFF")
    assert labels.encode(mask, "m.png").tolist() == [[0, 0, 1, IGNORE_INDEX]]
    assert (labels.decode(np.array([[0, 1]])) == rgb("804080", "40FF80")).all()


@pytest.mark.parametrize(("count", "found", "outputs"), [(2, "binary", 1), (3, "multiclass", 3)])
def test_task(count: int, found: str, outputs: int) -> None:
    labels = Labels.parse({f"c{i}": i for i in range(count)})
    assert (labels.task, labels.num_outputs, labels.num_classes) == (found, outputs, count)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": {}}, "at least two"),
        ({"classes": {"only": 0}}, "at least two, e.g. classes: "),
        ({"classes": {"a": 0, "b": [1, 0]}}, "mask value 0 is declared twice"),
        ({"classes": {"a": 0, "b": 255}, "ignore": 255}, "mask value 255 is declared twice"),
        ({"classes": {"a": "#00ff00", "b": "#00FF00"}}, "declared twice"),
        ({"classes": {"a": "#00FF00", "b": 1}}, "mix integers and colours"),
        ({"classes": {"a": "#00FF00", "b": "#00FF01"}, "ignore": 255}, "mix integers and colours"),
        ({"classes": {"a": 0, "b": "00FF00"}}, "class 'b' has the colour '00FF00': write it as \"#RRGGBB\""),
        ({"classes": {"a": 0, "b": "#00FF0"}}, "class 'b' has the colour"),
        ({"classes": {"a": 0, "b": {"value": 1, "color": "red"}}}, "class 'b' has the colour 'red'"),
        ({"classes": {"a": 0, "b": {"value": 1, "color": 7}}}, "class 'b' has the colour 7"),
        ({"classes": {"a": 0, "b": {"value": 1, "colour": "#00FF00"}}}, r"class 'b' has \['colour'\]"),
        ({"classes": {"a": 0, "b": {"color": "#00FF00"}}}, "class 'b' has the mask value None"),
        ({"classes": {"a": 0, "b": None}}, "in quotes"),  # what YAML makes of b: #00FF00
        ({"classes": {"a": 0, "b": 1.5}}, "class 'b' has the mask value 1.5"),
        ({"classes": {"a": 0, "b": True}}, "class 'b' has the mask value True"),
        ({"classes": {"a": 0, "b": 1}, "ignore": "void"}, "ignore has the colour 'void'"),
    ],
)
def test_a_bad_declaration_is_answered_with_the_fix(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Labels.parse(**options)


values = st.lists(st.integers(0, 65535), min_size=4, max_size=30, unique=True)


@settings(max_examples=60, deadline=None)
@given(codes=values, colors=st.booleans(), data=st.data())
def test_round_trip(codes: list[int], colors: bool, data: st.DataObject) -> None:
    """Against a dictionary, pixel by pixel; decode then gives the first value of the pixel's class."""
    codes = [code * 251 for code in codes] if colors else codes
    written = [f"#{code:06X}" for code in codes] if colors else codes
    groups = [written[:2], written[2:3], *([value] for value in written[4:])]
    labels = Labels.parse({f"c{i}": group for i, group in enumerate(groups)}, ignore=written[3])
    drawn = data.draw(st.lists(st.sampled_from(codes), min_size=1, max_size=40))
    flat = np.array(drawn)
    mask = np.stack([flat >> 16, flat >> 8 & 255, flat & 255], axis=-1).astype(np.uint8) if colors else flat
    if not colors and flat.max() < 256:
        mask = flat.astype(np.uint8)

    index = labels.encode(mask[None], "m.png")

    truth = {w: i for i, group in enumerate(groups) for w in group} | {written[3]: IGNORE_INDEX}
    expected = [truth[written[codes.index(code)]] for code in drawn]
    assert index.dtype == np.int64
    assert index.tolist() == [expected]
    kept = index[index != IGNORE_INDEX][None]
    back = labels.decode(kept)
    assert (labels.encode(back, "again.png") == kept).all()
    first = [groups[i][0] for i in kept[0]]
    assert [f"#{bytes(p).hex().upper()}" if colors else int(p) for p in back[0]] == first
    assert Labels(**labels.as_dict()) == labels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.float32, bool])
def test_any_type_of_mask(dtype: type) -> None:
    labels = Labels.parse({"a": 1, "b": 0})
    assert labels.encode(np.array([[0, 1]], dtype), "m").tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("classes", "mask", "fixed"),
    [
        ({"background": 0, "nucleus": 1}, [0, 0, 255], [0, 0, 1]),
        ({"background": 0, "nucleus": 1}, [255, 255], [1, 1]),
        (NUCLEI, [0, 1, 1], [0, 1, 1]),
        ({"nucleus": 1, "background": 0}, [0, 255, 255], [1, 0, 0]),  # 0 is still the background
        ({"nucleus": 255, "background": 0}, [0, 1], [1, 0]),
        ({"background": 1, "nucleus": 2}, [0, 255], [0, 1]),
        ({"no": 0, "a: b, {c}": 1}, [0, 255], [0, 1]),  # names that YAML would misread
    ],
)
def test_zero_and_255(classes: dict[str, int], mask: list[int], fixed: list[int]) -> None:
    """The commonest mistake: the declared 0/1 is 0/255 in the files, or the other way round."""
    array = np.array([mask], np.uint8)
    with pytest.raises(InputError, match=r"^cells/7\.png: ") as error:
        Labels.parse(classes).encode(array, "cells/7.png")
    suggested = suggestions(str(error.value))[0]
    assert list(suggested["classes"]) == list(classes)
    assert Labels.parse(**suggested).encode(array, "cells/7.png").tolist() == [fixed]


@pytest.mark.parametrize(
    ("classes", "ignore", "mask", "listed"),
    [
        ({"a": 0, "b": 1, "c": 2}, None, [0, 1, 2, 11, 11, 254], "11 (2 pixels), 254 (1 pixel), of 6"),
        ({"a": 0, "b": [1, 2]}, 255, [0, 1, 2, 3, 255], "3 (1 pixel), of 5"),
        ({"a": 1, "b": 2}, None, [0, 1, 2], "0 (1 pixel), of 3"),
        ({"a": 1, "b": 2}, None, [0, 0], "0 (2 pixels), of 2"),
        ({"a": 0, "b": 1}, None, [0, 1, 255], "255 (1 pixel), of 3"),  # 255 is not the b of a mask that has a b
        ({"a": 1, "b": 2}, 0, [0, 255], "255 (1 pixel), of 2"),
        ({"a": 0, "b": 7}, 255, [0, 1, 255], "1 (1 pixel), of 3"),
        ({"größe": 0, "b": {"value": 1, "color": "#102030"}}, [9], [0, 9, 300], "300 (1 pixel), of 3"),
    ],
)
def test_undeclared_values(classes: dict[str, Any], ignore: Any, mask: list[int], listed: str) -> None:
    array = np.array([mask], np.uint16)
    labels = Labels.parse(classes, ignore)
    with pytest.raises(InputError) as error:
        labels.encode(array, "m/1.png")
    message = str(error.value)
    assert message.startswith("m/1.png: mask values that classes does not declare")
    assert listed.partition(", of")[0] in message
    assert "\n" not in message
    fix, *ignoring = suggestions(message)
    known = {value: i for i, group in enumerate(labels.values) for value in group}

    given = {"classes": classes, "ignore": ignore}
    fixed = Labels.parse(**given | fix).encode(array, "m/1.png")
    for value, index in zip(mask, fixed[0], strict=True):
        assert index == known.get(value, index)
    for more_ignored in ignoring:
        fixed = Labels.parse(**given | more_ignored).encode(array, "m/1.png")
        assert fixed[0].tolist() == [known.get(v, IGNORE_INDEX) for v in mask]


def test_undeclared_colors() -> None:
    classes = {"road": "#804080", "car": "#400080"}
    mask = rgb("804080", "00FF7F", "00FF7F", "000001")
    with pytest.raises(InputError, match=r"^m\.png: .* #00FF7F \(2 pixels\), #000001 \(1 pixel\), of 4\.") as error:
        Labels.parse(classes).encode(mask, "m.png")
    more_classes, more_ignored = suggestions(str(error.value))
    assert Labels.parse(**more_classes).encode(mask, "m.png").tolist() == [[0, 3, 3, 2]]
    ignored = Labels.parse(classes, **more_ignored).encode(mask, "m.png")
    assert ignored.tolist() == [[0] + [IGNORE_INDEX] * 3]


def test_many_undeclared_values_look_like_a_photograph() -> None:
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    with pytest.raises(InputError, match=r"m\.jpg: .*8 \(1 pixel\) and 246 more, of 256\..*JPEG.*save masks as PNG"):
        Labels.parse(NUCLEI).encode(mask, "m.jpg")


def test_color_and_index_masks_are_told_apart() -> None:
    with pytest.raises(
        InputError, match=r"m\.png: .*0 \(2 pixels\), 7 \(2 pixels\).*Fix: classes: \{background: 0, foreground: 7\}"
    ):
        Labels.parse({"a": "#000000", "b": "#FFFFFF"}).encode(np.eye(2, dtype=np.uint8) * 7, "m.png")
    with pytest.raises(
        InputError, match=r"m\.png: .*#FF0000 \(2 pixels\), #00FF00 \(1 pixel\), of 3\. Fix: classes: .*'#00FF00'"
    ):
        Labels.parse({"a": 0, "b": 1}).encode(rgb("FF0000", "00FF00", "FF0000"), "m.png")


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_fractions_are_not_rounded(value: float) -> None:
    with pytest.raises(InputError, match=r"m\.tif: .*fractions"):
        Labels.parse({"a": 0, "b": 1}).encode(np.array([[0, value]], np.float32), "m.tif")


def test_decode_keeps_values_above_255() -> None:
    assert Labels.parse({"a": 0, "b": 256}).decode(np.array([1, 0])).tolist() == [256, 0]
