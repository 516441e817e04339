# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of the page in a real browser: it is read, listened to, and clusters get their names on it.
"""

import json
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_page import make_page
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from avdet2.evaluation.naming.cluster_file import ClusterFile
from avdet2.report.server import make_server

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update --disable-dev-shm-usage --mute-audio
--force-prefers-reduced-motion"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    """
    A Chromium without a window; its downloads go to the folder `downloads`.
    """
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs):
        pytest.skip("no chromium with its chromedriver")
    folder = tmp_path_factory.mktemp("browser")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={folder / 'profile'}")
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    driver.downloads = folder
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_page(folder)
    return folder


@pytest.fixture
def page(browser, run) -> webdriver.Chrome:
    """
    The page, opened from disk.
    """
    browser.get((run / "report" / "index.html").as_uri())
    return browser


def wait(browser, condition) -> None:
    WebDriverWait(browser, 60, 0.05).until(condition)


def one(browser, css: str):
    return browser.find_element(By.CSS_SELECTOR, css)


def rename(browser, number: int, name: str) -> None:
    field = one(browser, f"#cluster-{number} .name input")
    field.clear()
    field.send_keys(name)


def errors(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_it_loads_whole_and_without_errors(page):
    wait(page, lambda page: page.execute_script("return document.readyState") == "complete")
    assert errors(page) == []
    names = [x.get_attribute("value") for x in page.find_elements(By.CSS_SELECTOR, ".name input")]
    assert names == ["horn", "drum", "cluster_002"]
    # Those of the first cluster are drawn; those below, once they are scrolled to.
    script = "return document.querySelector('#cluster-0 .frame img').naturalWidth"
    wait(page, lambda page: page.execute_script(script))
    frames = page.find_elements(By.CSS_SELECTOR, ".frame img:not(.heat)")
    assert len(frames) >= 6 and all("Frame of" in x.get_attribute("alt") for x in frames)


def test_nothing_comes_from_elsewhere(page, run):
    script = "return [...document.querySelectorAll('[src], link')].map(x => x.src || x.href)"
    files = page.execute_script(script)
    folder = (run / "report").as_uri() + "/"
    assert len(files) >= 20
    assert all(name.startswith((folder, "data:")) for name in files)
    style = (run / "report" / "page.css").read_text()
    assert "url(" not in style and "@import" not in style


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(page, width):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    script = "return [document.documentElement.scrollWidth, window.innerWidth]"
    found, window = page.execute_script(script)
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert found <= window == width


def test_boxes_lie_where_they_were_found(page):
    script = """const frame = document.querySelector('#cluster-0 .frame').getBoundingClientRect();
    const box = document.querySelector('#cluster-0 .box.self').getBoundingClientRect();
    return [(box.left - frame.left) / frame.width, (box.top - frame.top) / frame.height,
            box.width / frame.width, box.height / frame.height, frame.width / frame.height]"""
    assert page.execute_script(script) == pytest.approx([0.1, 0.2, 0.3, 0.4, 1.5], abs=0.01)


def test_a_player_plays_and_another_one_stops_it(page):
    first, second = page.find_elements(By.CSS_SELECTOR, "#cluster-0 .play")
    time = "return document.querySelectorAll('#cluster-0 audio')[{}].currentTime".format
    # By the keyboard.
    first.send_keys(Keys.SPACE)
    wait(page, lambda page: page.execute_script(time(0)) > 0.05)
    assert first.get_attribute("aria-pressed") == "true"
    second.click()
    wait(page, lambda page: page.execute_script(time(1)) > 0.05)
    wait(page, lambda page: first.get_attribute("aria-pressed") == "false")
    # To its end.
    wait(page, lambda page: second.get_attribute("aria-pressed") == "false")
    assert errors(page) == []


def test_heatmaps_and_doubtful_clusters_are_switched(page):
    heat, good = one(page, "#cluster-0 .heat"), one(page, "#cluster-0")
    assert not heat.is_displayed()
    one(page, "[data-show=heat]").click()
    assert heat.is_displayed()
    one(page, "#doubtful").click()
    assert not good.is_displayed() and one(page, "#cluster-2").is_displayed()


def test_detections_are_shown_from_a_score_on(page):
    found, slider = one(page, "#cluster-0 .box.found"), one(page, "#score")
    assert found.is_displayed()
    assert one(page, "#above").text == "0.5: 6 boxes on 6 frames"
    # They have 0.8.
    for _ in range(7):
        slider.send_keys(Keys.ARROW_RIGHT)
    assert not found.is_displayed()
    assert one(page, "#above").text == "0.85: 0 boxes on 6 frames"


def test_names_are_downloaded_and_read_back(page, tmp_path):
    save = one(page, "#save")
    assert not save.is_enabled()
    rename(page, 2, "horn")
    assert one(page, "#cluster-2 .merged").text == "one class with cluster 0"
    # Enter goes on to the next name: there is none after the last, but there is after the first.
    one(page, "#cluster-0 .name input").send_keys(Keys.ENTER)
    page.switch_to.active_element.send_keys("snare")
    assert one(page, "#cluster-1 .tag").text == "snare 80 %"
    one(page, "#cluster-1 .keep input").click()
    save.click()
    file = page.downloads / "clusters.json"
    wait(page, lambda _: file.is_file())
    found = ClusterFile.read(file, 3)
    assert found.names == ["horn", "snare", "horn"]
    assert found.mapping.tolist() == [0, -1, 0]
    assert not save.is_enabled()


def test_a_cluster_without_a_name_is_not_saved(page):
    rename(page, 0, " ")
    assert not one(page, "#save").is_enabled()
    assert one(page, "#status").text == "Cluster 0 has no name"
    rename(page, 0, "horn")
    assert one(page, "#save").is_enabled()


@pytest.fixture
def served(tmp_path) -> Iterator[tuple[Path, str]]:
    """
    A run of its own, and the address at which its page is served.
    """
    run = tmp_path / "run"
    make_page(run)
    with make_server(run) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield run, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_names_are_saved_into_the_run_and_there_the_next_time(browser, served):
    run, address = served
    browser.get(address)
    rename(browser, 1, "kettle drum")
    one(browser, "#save").click()
    file = run / "clusters.json"
    wait(browser, lambda page: one(page, "#status").text == f"Saved: {file}")
    assert ClusterFile.read(file, 3).names == ["horn", "kettle drum", "cluster_002"]
    browser.get(address)
    wait(
        browser, lambda page: one(page, "#cluster-1 input").get_attribute("value") == "kettle drum"
    )
    assert errors(browser) == []


def answer(address: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    method = "GET" if body is None else "PUT"
    request = urllib.request.Request(address, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as found:
            return found.status, found.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_only_good_names_from_this_machine_are_written(served):
    run, address = served
    names, kind = f"{address}/clusters.json", {"Content_Type": "application/json"}
    good = json.dumps({"clusters": [{"id": 0, "name": "horn"}]}).encode()
    assert answer(names, b'{"clusters": [{"id": 0}]}', **kind)[0] == 400
    assert answer(names, b"no json", **kind)[0] == 400
    # What a form on another site can send.
    assert answer(names, good, Content_Type="text/plain")[0] == 404
    assert answer(f"{address}/index.html", good, **kind)[0] == 404
    assert answer(names, good, **kind, Host="evil.example")[0] == 403
    assert answer(names, good, **kind, Content_Length=str(1 << 21))[0] == 413
    assert not (run / "clusters.json").exists()
    assert answer(names, good, **kind) == (200, str(run / "clusters.json"))
    # Nothing else of the run is served.
    assert answer(f"{address}/../detector/config.yaml")[0] == 404
    assert answer(f"{address}/", Host="evil.example")[0] == 403
