"""report.html: what it holds, that it holds all of it, that names cannot break it, and how a browser shows it."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import TINY, make_folder, train
from segmentation.data.labels import Labels
from segmentation.doctor import diagnose
from segmentation.metrics import confusion_counts, mean_iou, tp_fp_fn
from segmentation.training.page import write_page

SCRIPT = "<script>alert(1)</script>"
CHROME = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


class Page(HTMLParser):
    """What a page holds: its elements, the text of its cells and all of its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def check_alone(self) -> None:
        """It asks for nothing: every address is data."""
        for _, attributes in self.elements:
            for key in ("src", "href", "action", "data", "srcset", "poster"):
                assert (attributes.get(key) or "data:").startswith("data:")
        assert len(self.all("script")) == 1
        assert "url(" not in " ".join(self.words)


def made(labels: Labels, count: int, size: tuple[int, int] = (480, 640)) -> dict[str, Any]:
    """The sections of a page of smooth masks and rough images."""
    rng = np.random.default_rng(0)
    samples, counts, matrix = [], [], torch.zeros(labels.num_classes, labels.num_classes)
    for number in range(count):
        cells = rng.integers(0, labels.num_classes, (2, size[0] // 40, size[1] // 40))
        truth, prediction = torch.from_numpy(cells.repeat(40, axis=1).repeat(40, axis=2))
        found = confusion_counts(prediction[None], truth[None], labels.num_classes)[0]
        image = rng.integers(0, 256, (3, size[0] // 4, size[1] // 4), np.uint8).repeat(4, axis=1).repeat(4, axis=2)
        sample = {
            "image": torch.from_numpy(image),
            "mask": truth,
            "prediction": prediction,
            "name": f"{SCRIPT}{number}",
        }
        samples.append({**sample, "miou": mean_iou(found).item()})
        matrix += found
        counts.append(torch.stack(tp_fp_fn(found)))
    return {"matrix": matrix, "counts": torch.stack(counts), "metrics": {}, "labels": labels, "samples": samples}


def test_a_run_is_on_one_page(place: Path) -> None:
    train(*TINY, "--name", "run", "--pictures.images", "1")
    page = Page(place / "runs/run/report.html")
    page.check_alone()
    summary = json.loads((place / "runs/run/summary.json").read_text())
    for key in ("miou", "pixel_accuracy", "iou/ring", "dice/star", "recall/disk", "precision/background"):
        value = summary[f"test/{key}"]
        assert ("\N{EN DASH}" if value is None else f"{value:.4f}") in page.words, key
    for name in ("background", "disk", "ring", "triangle", "star"):
        assert page.words.count(name) >= 3  # in the table, and twice in the confusion matrix
    assert len([each for each in page.all("input") if each["type"] == "range"]) == 5  # of six images
    assert len(page.all("svg")) == 2
    assert {"Loss", "mIoU", "train", "val"} <= set(page.words)
    options = next(word for word in page.words if word.startswith("#"))
    assert "max_epochs: 2" in options
    assert "weight_decay" not in options  # as in default.yaml
    assert page.words[page.words.index("epoch") + 1] == str(summary["epoch"] + 1)  # as the run prints it, from 1
    assert not [image for image in page.all("img") if not image["alt"]]


def test_without_pictures_the_page_has_none(place: Path) -> None:
    train(*TINY, "--name", "run")
    page = Page(place / "runs/run/report.html")
    assert page.all("img") == []
    assert len(page.all("svg")) == 2


def test_a_page_that_fails_costs_no_result(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("segmentation.training.report.write_page", fail)
    with pytest.warns(UserWarning, match=r"report\.html is not written: disk full"):
        train(*TINY, "--name", "run")
    assert "test/miou" in json.loads((place / "runs/run/summary.json").read_text())


def test_names_are_text(place: Path) -> None:
    labels = Labels.parse({SCRIPT: 0, '"><b onclick="x': 1, "道路": 2})
    rows = [{"step": 9, "epoch": 0, "val/loss": float("nan"), "val/miou": 0.5}]
    write_page(place / "p.html", title=SCRIPT, lines=[SCRIPT, "\udcff"], options=SCRIPT, rows=rows, **made(labels, 2))
    page = Page(place / "p.html")
    page.check_alone()
    assert not [attributes for _, attributes in page.elements if "onclick" in attributes]
    assert "道路" in page.words
    assert len(page.all("svg")) == 1  # a loss that is not finite has no plot


@pytest.mark.parametrize("classes", [2, 40])
def test_a_page_of_six_large_images_can_be_sent(classes: int, place: Path) -> None:
    labels = Labels.parse({f"class {index}": index for index in range(classes)})
    write_page(place / "page.html", title="large", **made(labels, 6, (960, 1280)))
    assert (place / "page.html").stat().st_size < 3e6
    assert len(Page(place / "page.html").all("tr")) >= 2 * classes


def test_the_doctor_writes_a_page(place: Path) -> None:
    root = make_folder(place / "data", {"train": 6, "val": 2})
    given = ["--data.dataset", "FolderData", "--data.dataset.root", str(root)]
    assert diagnose([*given, "--data.dataset.classes", f"{{ground: 0, {SCRIPT!r}: 255}}"]) == []
    page = Page(place / "doctor/report.html")
    page.check_alone()
    assert {"✓ nothing is wrong", "ground", SCRIPT, "[255]"} <= set(page.words)
    assert len(page.all("figure")) == 4  # two of each split
    assert any("class_path: segmentation.data.FolderData" in word for word in page.words)
    (problem,) = diagnose(["--data.dataset", "FolderData", "--data.dataset.root", "nowhere"])
    page = Page(place / "doctor/report.html")
    assert problem.text in page.words
    assert page.all("img") == []


# in a browser


class Browser:
    """Chromium, by its DevTools protocol over a pipe: a message is JSON that ends with a zero."""

    def __init__(self, profile: Path) -> None:
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            [str(CHROME), *options, f"--user-data-dir={profile}"],
            preexec_fn=lambda: (os.dup2(commands, 3), os.dup2(answers, 4)),  # where it looks for the pipes
            pass_fds=(3, 4),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.events: list[dict] = []
        self.unread = b""
        self.number = 0
        self.session: dict[str, str] = {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def read(self) -> dict:
        while b"\0" not in self.unread:
            part = os.read(self.answers, 1 << 16)
            assert part, "the browser has ended"
            self.unread += part
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def send(self, method: str, **params: Any) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path) -> None:
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not [event for event in self.events if event["method"] == "Page.loadEventFired"]:
            self.events.append(self.read())

    def ask(self, code: str) -> Any:
        return self.send("Runtime.evaluate", expression=code)["result"].get("value")

    def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


@pytest.fixture
def browser(place: Path) -> Iterator[Browser]:
    if not CHROME:
        pytest.skip("no Chromium here: apt install chromium")
    browser = Browser(place / "profile")
    yield browser
    browser.process.kill()
    browser.process.wait()


@pytest.mark.slow
def test_the_page_in_a_browser(browser: Browser, place: Path) -> None:
    """Keys move the slider and switch what lies over the images; nothing is fetched, nothing goes wrong."""
    rows = [{"step": step, "epoch": step, "val/loss": 1 / step, "train/miou": 0.1 * step} for step in range(1, 9)]
    labels = Labels.parse({"sky": 0, SCRIPT: 1, "car": 2})
    write_page(place / "page.html", title=SCRIPT, rows=rows, options=SCRIPT, **made(labels, 6))
    browser.open(place / "page.html")

    edge = "getComputedStyle(document.querySelector('[data-layer=Prediction]')).clipPath"
    browser.ask("document.querySelector('input[type=range]').focus()")
    before = browser.ask(edge)
    browser.press("ArrowRight", 39)
    assert "50%" in before
    assert "49%" in browser.ask(edge)  # is cut off

    shown = "getComputedStyle(document.querySelector('[data-layer=Truth]')).display"
    assert browser.ask(shown) == "none"
    browser.ask("document.querySelector('input[type=radio]').focus()")
    browser.press("ArrowRight", 39)
    assert browser.ask(shown) == "block"

    first = "document.querySelector('.sortable tbody th').textContent"
    browser.ask("document.querySelectorAll('.sortable button')[0].click()")
    assert browser.ask(first) == SCRIPT
    browser.ask("document.querySelectorAll('.sortable button')[0].click()")
    assert browser.ask(first) == "sky"

    assert browser.ask("[...document.images].every((image) => image.naturalWidth > 0)")
    browser.send("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    assert browser.ask("document.documentElement.scrollWidth") <= 390  # wide tables scroll by themselves
    methods = [event["method"] for event in browser.events]
    assert not {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"} & set(methods)
    requests = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith("data:")] == [(place / "page.html").as_uri()]
