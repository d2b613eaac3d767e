"""The app in a browser: it works without a network, listens on loopback, and gives away no other files."""

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_timm_tower import TimmModel
from hf_timm_tower.embedding.shown_set import ShownSet

from ..local_hub import LocalHub

gradio_app = pytest.importorskip("hf_timm_tower.embedding.gradio", reason="gradio is not installed (extra app)")

SECONDS = 120


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app") / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    shutil.copy(folder / "0.png", folder / "copy.png")
    return folder


@pytest.fixture(scope="module")
def shown(photos: Path) -> ShownSet:
    torch.manual_seed(0)
    tower = TimmModel("test_vit", embed_dim=8, image_size=64).eval()
    return ShownSet(tower, tower.embed_to(photos, photos.parent / "photos.emb", num_workers=0, progress=False))


@pytest.fixture(scope="module")
def address(shown: ShownSet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        yield gradio_app.serve(shown, block=False)
    gradio_app.gr.close_all()


def test_it_listens_on_loopback_and_serves_no_file_by_its_path(address: str, photos: Path) -> None:
    assert address.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(address, timeout=SECONDS) as page:
        assert b"hf-timm-tower" in page.read()
    for path in (photos / "0.png", photos.parent / "photos.emb" / "manifest.json", Path("/etc/passwd")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={path}", timeout=SECONDS)
        assert refused.value.code == 403


def test_a_set_of_one_image_is_shown(shown: ShownSet, photos: Path, tmp_path: Path) -> None:
    stored = shown.tower.embed_to(photos / "0.png", tmp_path / "one.emb", num_workers=0, progress=False)
    assert gradio_app.make_app(ShownSet(shown.tower, stored)) is not None


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra app-test)")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with its driver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1200,1000",
        f"--user-data-dir={tmp_path}/profile",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    running.set_page_load_timeout(SECONDS)
    yield running
    running.quit()


@pytest.mark.slow
def test_in_a_browser_without_network_everything_is_found_and_clicked(browser: Any, address: str, photos: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def wait(condition: Callable[[], Any]) -> Any:
        return WebDriverWait(browser, SECONDS).until(lambda _: condition())

    def find(selector: str) -> list[Any]:
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def tab(name: str) -> None:
        wait(lambda: [each for each in find("button[role=tab]") if each.text == name])[0].click()

    def picture(box: str) -> Any:
        return wait(lambda: next((each for each in find(f"#{box} img") if each.is_displayed()), None))

    browser.get(address)
    wait(lambda: find("#query input[type=file]"))[0].send_keys(str(photos / "0.png"))
    wait(lambda: "1.0000 copy.png" in find("#neighbours")[0].text)
    assert "1.0000 0.png" in find("#neighbours")[0].text

    tab("Inside an image")
    wait(lambda: find("#patches-query input[type=file]"))[0].send_keys(str(photos / "3.png"))
    view, before = picture("view"), picture("similarity").get_attribute("src")
    picture("components")
    ActionChains(browser).move_to_element_with_offset(view, -view.size["width"] // 3, 0).click().perform()
    wait(lambda: picture("similarity").get_attribute("src") != before)

    tab("Map")
    wait(lambda: find("#draw"))[0].click()
    ActionChains(browser).move_to_element(picture("map")).click().perform()
    wait(lambda: "1.0000" in find("#there")[0].text)

    tab("Duplicates and outliers")
    wait(lambda: find("#compare"))[0].click()
    wait(lambda: "1.0000 copy.png" in find("#duplicates")[0].text)
    assert find("#outliers img")

    asked = [
        message["params"]["request"]["url"]
        for entry in browser.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
    ]
    assert len(asked) > 10
    elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:", "chrome"))]
    assert elsewhere == [], "the page asks this machine only"


@pytest.mark.slow
def test_the_command_makes_a_space_that_has_all_that_the_app_needs(
    photos: Path, tmp_path: Path, fresh_process: Callable[..., str]
) -> None:
    with LocalHub(tmp_path / "hub") as hub:
        printed = fresh_process(
            """
            import contextlib, os, sys
            from huggingface_hub import snapshot_download
            from hf_timm_tower import TimmModel
            from hf_timm_tower.cli import main

            def command(*words):
                sys.argv = ["hf-timm-tower", *words]
                try:
                    main()
                except SystemExit as end:
                    print("ended", end.code)

            photos = sys.argv[1]
            tower = TimmModel("test_resnet", embed_dim=8, image_size=32)
            tower.save_pretrained("local")
            command("embed", photos, "--to", "local.emb", "--tower", "local", "--quiet")
            with contextlib.redirect_stderr(sys.stdout):
                command("serve", "local.emb", "--space", "ann/photos")
            tower.push_to_hub("ann/tower")
            command("embed", photos, "--to", "photos.emb", "--tower", "ann/tower", "--quiet")
            with contextlib.redirect_stderr(sys.stdout):
                command("serve", "photos.emb", "--space", "ann/photos")
            command("serve", "photos.emb", "--images", photos, "--space", "ann/photos")
            os.chdir(snapshot_download("ann/photos", repo_type="space"))
            program = open("app.py").read()
            assert program.count(".launch()") == 1
            made = {}
            exec(program.replace("make_app(", "app = make_app(").replace(".launch()", ""), made)
            print(type(made["app"]).__name__, open("README.md").read().count("sdk: gradio"))
            print("folder told:", photos in open("embeddings/manifest.json").read())
            print(sorted(os.listdir("images")))
            """,
            photos,
            env={**hub.env(tmp_path / "cache"), "HF_HUB_OFFLINE": None},
        )
    assert printed.count("was not loaded from a repository") == 1
    assert printed.count("all of them become public, so name their folder") == 1
    assert printed.count("ended 1") == 2
    assert printed.count("ended 0") == 3
    assert printed.splitlines()[-3:] == [
        "Blocks 1",
        "folder told: False",
        str(sorted(path.name for path in photos.iterdir())),
    ]
