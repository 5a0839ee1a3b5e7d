"""The page at `/` in a real browser: what it shows of the model is what the merged model answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page, expect
from safetensors.torch import load_file

import paretofuse as pf
from tests.support.browser import chromium, opened
from tests.support.models import perturbed
from tests.support.served import character_tokenizer, running, text_store

testclient = pytest.importorskip("starlette.testclient", reason="the server comes with the extra `serve`")

SHARES = np.linspace(1, 0, 5)
AVERAGE = {"average": {"news": 30.0, "poems": 31.0}}
FRONT = pf.Front(
    np.stack([SHARES, 1 - SHARES], axis=1),
    np.stack([40 - 20 * SHARES**0.5, 40 - 20 * (1 - SHARES) ** 0.5], axis=1),
    ("news", "poems"),
    ("news", "poems"),
    maximize=False,
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> pf.Engine:
    return pf.load(text_store(tmp_path_factory.mktemp("served"), chat=True))


@pytest.fixture(scope="module")
def url(engine: pf.Engine) -> Iterator[str]:
    from paretofuse.serving import create_app

    with running(
        create_app(
            engine,
            model_name="tiny",
            front=FRONT,
            base={"poems": 44.0, "news": 43.0},
            points=AVERAGE,
        )
    ) as url:
        yield url


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    with opened(browser, url, viewport={"width": 1280, "height": 1000}) as page:
        expect(page.get_by_role("heading", name="Ask the model")).to_be_visible()
        yield page


def set_preference(page: Page, slot: str, news: float) -> None:
    page.get_by_role("radio", name=slot).check()
    page.get_by_role("spinbutton", name="news in percent").fill(str(100 * news))


def ask(page: Page, prompt: str, tokens: int) -> list[str]:
    """What the page shows at A and at B, prompts included."""
    page.get_by_role("textbox", name="Prompt").fill(prompt)
    page.get_by_role("spinbutton", name="tokens").fill(str(tokens))
    page.get_by_role("button", name="Answer at A and at B").click()
    found = []
    for slot in ("A", "B"):
        expect(page.locator(f"#took-{slot}")).to_contain_text(" s", timeout=60_000)
        expect(page.locator(f"#answer-{slot}")).to_have_attribute("aria-busy", "false")
        found.append(page.locator(f"#answer-{slot}").text_content() or "")
    return found


def greedy(engine: pf.Engine, news: float, prompt: str, tokens: int) -> str:
    tokenizer = character_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    merged = engine.merge({"news": news, "poems": 1 - news})
    found = merged.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def test_answers_side_by_side_are_those_of_the_merged_models(page: Page, engine: pf.Engine) -> None:
    set_preference(page, "A", 0.7)
    set_preference(page, "B", 0.1)
    page.get_by_label("as a chat").uncheck()
    prompt = "The <b>sea</b>"  # its tags are unknown characters to the model, and text to the page
    answers = ask(page, prompt, 12)
    assert answers == [prompt + greedy(engine, news, prompt, 12) for news in (0.7, 0.1)]
    expect(page.locator("#answer-heading-A")).to_have_text("A: news 70 %, poems 30 %")
    assert page.locator(".answer b").count() == 0
    page.get_by_label("as a chat").check()
    answers = ask(page, "Hi", 6)
    assert answers == [greedy(engine, news, "user: Hi. assistant: ", 6) for news in (0.7, 0.1)]


def test_the_heading_is_the_sliders_until_there_is_an_answer(page: Page) -> None:
    set_preference(page, "A", 0.3)
    expect(page.locator("#answer-heading-A")).to_have_text("A: news 30 %, poems 70 %")
    ask(page, "Hi", 2)
    set_preference(page, "A", 0.9)
    expect(page.locator("#answer-heading-A")).to_have_text("A: news 30 %, poems 70 %")


def test_refusals_are_shown_in_the_servers_words(page: Page) -> None:
    page.get_by_role("button", name="Answer at A and at B").click()
    expect(page.locator("#compared")).to_have_text("Write a prompt first.")
    page.get_by_role("textbox", name="Prompt").fill("a" * 80)
    with page.expect_response("**/v1/chat/completions") as refused:
        page.get_by_role("button", name="Answer at A and at B").click()
    assert refused.value.status == 400
    expect(page.locator("#answer-A")).to_contain_text("expected at most 64 in all")


def test_facts_of_the_merged_model(page: Page, engine: pf.Engine) -> None:
    expect(page.locator("#facts")).to_contain_text("GPT2LMHeadModel")
    count = sum(spec.numel for spec in engine.layout.tensors)
    expect(page.locator("#facts")).to_contain_text(f"{count:,}")
    expect(page.locator("#metrics")).to_contain_text("lower is better")
    expect(page.locator("#metrics thead")).to_contain_text("base")
    average = page.locator("#metrics tbody td:last-child").all_inner_texts()
    base = page.locator("#metrics tbody td:nth-last-child(2)").all_inner_texts()
    assert (base, average) == (["43", "44"], ["30", "31"])
    expect(page.locator("#legend")).to_contain_text("◆ base")
    expect(page.locator("#legend")).to_contain_text("average")


def test_the_default_is_set_for_all(page: Page, url: str) -> None:
    set_preference(page, "A", 0.25)
    page.get_by_role("button", name="Make it the server's default").click()
    expect(page.locator("#default")).to_have_text("Default: news 25 %, poems 75 %")
    page.reload()
    expect(page.locator("#default")).to_have_text("Default: news 25 %, poems 75 %")
    expect(page.locator("#reached")).to_contain_text("A: news 25 %, poems 75 %")


def test_the_download_is_the_merged_model(page: Page, engine: pf.Engine, tmp_path: Path) -> None:
    set_preference(page, "A", 0.6)
    with page.expect_download() as started:
        page.get_by_role("link", name="Download the model").click()
    started.value.save_as(tmp_path / "model.safetensors")
    assert started.value.suggested_filename == "model.safetensors"
    found = load_file(tmp_path / "model.safetensors")
    merged = engine.merge_state_dict({"news": 0.6, "poems": 0.4})
    assert all(torch.equal(tensor, merged[name]) for name, tensor in found.items())
    assert len(found) >= 28
    expect(page.get_by_role("link", name="Download the adapter")).to_be_hidden()  # the planes are dense


def test_the_commands_do_what_the_page_does(page: Page, engine: pf.Engine, tmp_path: Path) -> None:
    set_preference(page, "A", 0.7)
    page.get_by_label("as a chat").uncheck()
    prompt = 'It\'s "so"; $HOME `x`'
    page.get_by_role("textbox", name="Prompt").fill(prompt)
    page.get_by_role("spinbutton", name="tokens").fill("9")
    texts = [block.replace("\xa0", " ") for block in page.locator(".command code").all_inner_texts()]
    assert len(texts) == 4
    truth = greedy(engine, 0.7, prompt, 9)
    shell = subprocess.run(["bash", "-c", texts[0]], capture_output=True, text=True, check=True)
    assert json.loads(shell.stdout)["choices"][0]["text"] == truth
    python = subprocess.run([sys.executable, "-c", texts[1]], capture_output=True, text=True, check=True)
    assert python.stdout.rstrip("\n") == truth.rstrip("\n")
    assert texts[2] == "paretofuse merge STORE --preference news=0.7,poems=0.3 -o OUT"
    subprocess.run(["bash", "-c", texts[3]], cwd=tmp_path, capture_output=True, check=True)
    assert torch.equal(
        load_file(tmp_path / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"],
        engine.merge_state_dict({"news": 0.7, "poems": 0.3})["transformer.h.0.mlp.c_fc.weight"],
    )


def test_a_key_is_asked_for(browser: Browser, engine: pf.Engine) -> None:
    from paretofuse.serving import create_app

    with running(create_app(engine, api_keys=["right"])) as url, opened(browser, url) as page:
        key = page.get_by_label("API key")
        expect(key).to_be_visible()
        expect(page.get_by_role("heading", name="Ask the model")).to_be_hidden()
        key.fill("wrong")
        key.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("no API key that this server knows")
        key.fill("right")
        key.press("Enter")
        expect(page.get_by_role("heading", name="Ask the model")).to_be_visible()
        expect(key).to_be_hidden()
        expect(page.locator("#failed")).to_have_text("")
        page.get_by_label("as a chat").uncheck()
        assert ask(page, "The sea", 4)[1] == "The sea" + greedy(engine, 1.0, "The sea", 4)
        # A server without a front: sliders and answers work, and nothing is drawn.
        expect(page.locator("#figure-help")).to_contain_text("Nothing is measured yet")
        assert "Authorization: Bearer $KEY" in page.locator(".command code").first.inner_text()


def test_an_image_is_classified_at_both(browser: Browser, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    image_module = pytest.importorskip("PIL.Image")
    from paretofuse.serving import create_app

    names = ("cat", "dog", "hen")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16,
        patch_size=8, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.ViTForImageClassification(config).eval()
    engine = pf.stack(base, {name: perturbed(base, i, 0.3) for i, name in enumerate(("news", "poems"), 1)})
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    image = image_module.fromarray(pixels)
    image.save(tmp_path / "image.png")
    inputs = processor(images=image, return_tensors="pt")
    with running(create_app(engine, processor=processor)) as url, opened(browser, url) as page:
        expect(page.get_by_role("textbox", name="Prompt")).to_be_hidden()
        page.get_by_label("Image").set_input_files(tmp_path / "image.png")
        expect(page.get_by_alt_text("The image to be classified")).to_be_visible()
        page.get_by_role("button", name="Answer at A and at B").click()
        for slot, news in (("A", 0.5), ("B", 1.0)):
            expect(page.locator(f"#took-{slot}")).to_contain_text(" s", timeout=60_000)
            truth = engine.merge({"news": news, "poems": 1 - news})(**inputs).logits.softmax(-1)[0].tolist()
            expect(page.locator(f"#answer-{slot} strong")).to_have_text(names[truth.index(max(truth))])
            shown = page.locator(f"#answer-{slot} tr").all_inner_texts()
            found = {row.split()[0]: float(row.split()[1]) / 100 for row in shown}
            assert found == pytest.approx(dict(zip(names, truth, strict=True)), abs=1e-3)
        expect(page.locator("#compared")).to_contain_text("total variation")


def test_the_pages_files_and_nothing_else(engine: pf.Engine) -> None:
    from paretofuse.serving import create_app
    from paretofuse.serving.page.routes import FILES

    with testclient.TestClient(create_app(engine, api_keys=["key"])) as client:
        page = client.get("/")
        assert page.status_code == 200
        assert "default-src 'self'" in page.headers["content-security-policy"]
        for name in FILES:
            found = client.get(f"/page/{name}")
            assert found.status_code == 200
            assert found.headers["content-type"].startswith(
                "text/css" if name.endswith(".css") else "text/javascript"
            )
        for name in ("routes.py", "..%2froutes.py", "%2e%2e/app.py", "page.html"):
            assert client.get(f"/page/{name}", headers={"Authorization": "Bearer key"}).status_code == 404
        assert client.get("/v1/front").status_code == 401
    with pytest.raises(ValueError, match=r"got a base with the metrics \['news'\], expected exactly"):
        create_app(engine, front=FRONT, base={"news": 1.0})
    with pytest.raises(ValueError, match="expected no base without a front"):
        create_app(engine, base={"news": 1.0})
    with pytest.raises(ValueError, match="got a point 'average' with the metrics"):
        create_app(engine, front=FRONT, points={"average": {"news": 1.0}})
