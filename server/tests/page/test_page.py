"""The live page in a browser: what a user does, and what the engine says about it."""

import json
import re
import urllib.error
import urllib.request

import pytest
from playwright.sync_api import expect

RECEIPT = re.compile(r"^Aborted in (decode|prefill): [1-9]\d* blocks? and 1 row free after [\d.]+ (µs|ms)$")


def number(page, selector):
    """The number at the beginning of an element's text."""
    return int(re.match(r"\d+", page.inner_text(selector))[0])


def kv_usage(server):
    """Part of the KV blocks that somebody owns, as dashboards see it."""
    text = urllib.request.urlopen(f"{server.url}/metrics", timeout=10).read().decode()
    return float(re.search(r"^vllm:kv_cache_usage_perc\S* (\S+)$", text, re.MULTILINE)[1])


# Nearly all that fits the built-in model's context.
LONG = 900


def ask_for_long_answers(page):
    """The built-in model is done soon: the page's chats are made to go on, so that there is time to stop them."""

    def lengthen(route):
        body = route.request.post_data_json
        route.continue_(post_data=json.dumps({**body, "max_tokens": LONG, "ignore_eos": True}))

    page.route("**/v1/chat/completions", lengthen)


def once_begun(page, action, length=10):
    """Does something in the page as soon as the newest answer has so many characters: from out here it might come too late."""
    page.evaluate(
        """([action, length]) => new MutationObserver((_, observer) => {
            const newest = [...document.querySelectorAll(".assistant .text")].at(-1);
            if (!newest || newest.textContent.length < length) return;
            observer.disconnect();
            if (action === "click") document.getElementById("stop").click();
            else document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: action, bubbles: true}));
        }).observe(document.getElementById("log"), {subtree: true, childList: true, characterData: true})""",
        [action, length],
    )


def say(page, text):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answered(page):
    """Waits for the end of the newest answer."""
    page.wait_for_selector(".assistant:last-child[data-state]")
    return page.locator(".assistant").last


def nothing_in_use(page):
    """Waits until the page shows a batch without rows and blocks without owners."""
    expect(page.locator("#owned")).to_have_text("0", timeout=30_000)
    expect(page.locator("#rows tr")).to_have_count(0)
    expect(page.locator("#map")).to_have_attribute("aria-label", re.compile(r"^KV blocks: 0 in use, "))


def test_a_message_streams_and_the_next_one_continues_the_conversation(page):
    bodies = []
    page.on("request", lambda request: request.url.endswith("/chat/completions") and bodies.append(request.post_data_json))
    page.evaluate(
        """() => {
            window.lengths = [];
            new MutationObserver(() => lengths.push(document.querySelector(".assistant .text")?.textContent.length ?? 0))
                .observe(document.getElementById("log"), {subtree: true, childList: true, characterData: true});
        }"""
    )
    say(page, "Tell me a story.")
    answer = answered(page)
    text = answer.locator(".text").inner_text()
    seen = page.evaluate("[...new Set(lengths)]")
    assert len(text) > 0 and len(seen) > 3, f"{text!r} came in {seen}"
    assert re.search(r"first token after \d+ ms · \d+ tokens · \d+ tokens/s", answer.locator(".meta").inner_text())
    page.click(".settings summary")
    page.fill("#temperature", "0")
    page.fill("#max-tokens", "5")
    page.fill("#system", "Be brief.")
    say(page, "And then?")
    expect(page.locator(".assistant")).to_have_count(2)
    answered(page)
    first, second = bodies
    assert [message["role"] for message in first["messages"]] == ["user"]
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "user"]
    assert second["messages"][2]["content"] == text
    assert (second["temperature"], second["max_tokens"]) == (0, 5)
    assert "temperature" not in first and "max_tokens" not in first, "the server knows its defaults best"
    page.click("#new-chat")
    expect(page.locator(".message")).to_have_count(0)
    nothing_in_use(page)


def test_stop_aborts_and_shows_the_receipt(page, server):
    ask_for_long_answers(page)
    once_begun(page, "click")
    say(page, "Tell me a story.")
    receipt = page.locator(".assistant .receipt[data-known]")
    receipt.wait_for()
    assert RECEIPT.match(receipt.inner_text()), receipt.inner_text()
    assert "stopped" in page.inner_text(".assistant .meta")
    newest = page.locator("#receipts li").first
    expect(newest).to_contain_text("client left")
    assert newest.get_attribute("title").startswith("page-chat-")
    nothing_in_use(page)
    assert kv_usage(server) == 0, "the blocks are back"
    expect(page.locator("#send")).to_be_visible()
    # What was said before the stop is part of the conversation.
    page.unroute("**/v1/chat/completions")
    say(page, "Go on.")
    expect(page.locator(".assistant")).to_have_count(2)
    assert answered(page).get_attribute("data-state") == "done"


def test_escape_stops_too(page):
    ask_for_long_answers(page)
    once_begun(page, "Escape")
    say(page, "Tell me a story.")
    page.locator(".assistant .receipt[data-known]").wait_for()
    nothing_in_use(page)


def test_a_crowd_fills_the_batch_and_stop_all_empties_it(page, server):
    say(page, "Why does the tide come in?")
    answered(page)
    before = number(page, "#aborted")
    ask_for_long_answers(page)
    for _ in range(3):
        page.click("#crowd")
    assert page.locator("#crowd").is_disabled(), "browsers have six connections to a server"
    say(page, "Tell me a story about a mill by the sea.")
    expect(page.locator("#rows tr")).to_have_count(6)
    expect(page.locator("#running")).to_have_text("6 of 6")
    expect(page.locator("#waiting")).to_have_text(re.compile(r"^[1-9]"))
    expect(page.locator("#owned")).to_have_text(re.compile(r"^([7-9]|[1-9]\d)"))
    colours = page.evaluate("[...document.querySelectorAll('#rows i')].map((dot) => dot.style.background)")
    assert len(set(colours)) == 6, f"each row has its own colour: {colours}"
    assert kv_usage(server) > 0
    page.click("#stop-all")
    nothing_in_use(page)
    expect(page.locator("#waiting")).to_have_text("0")
    expect(page.locator("#stop-all")).to_be_disabled()
    assert kv_usage(server) == 0
    assert number(page, "#aborted") > before + 6
    stages = set(page.locator("#receipts .stage").all_inner_texts())
    assert "decode" in stages and stages <= {"queued", "prefill", "decode"}


def test_curves_and_map_are_drawn(page):
    page.click("#crowd")
    expect(page.locator("#rate")).to_have_text(re.compile(r"^[1-9]\d* tokens/s$"))
    expect(page.locator("#itl")).to_have_text(re.compile(r"^[\d.]+ (µs|ms) · [\d.]+ (µs|ms)$"))
    expect(page.locator("#ttft")).to_have_text(re.compile(r"^[\d.]+ (µs|ms|s)$"))
    for canvas in ("map", "rate-curve", "ttft-curve", "itl-curve"):
        colours = page.evaluate(
            """(id) => {
                const canvas = document.getElementById(id);
                const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                return new Set(new Uint32Array(data.buffer)).size;
            }""",
            canvas,
        )
        assert colours > 2, f"{canvas} shows {colours} colours"
    page.hover("#map", position={"x": 4, "y": 4})
    expect(page.locator("#map-note")).to_have_text(re.compile(r"^0: \S"))
    nothing_in_use(page)


def test_text_is_never_markup(page):
    say(page, "<img src=x onerror=alert(1)><b>bold</b>")
    answered(page)
    assert page.inner_text(".user") == "<img src=x onerror=alert(1)><b>bold</b>"
    assert page.locator("#log img, #log b").count() == 0


def test_reasoning_is_folded_and_tool_calls_are_shown(page):
    """The built-in model does neither, so the answer is ours."""
    deltas = [
        {"role": "assistant"},
        {"reasoning_content": "Let me "},
        {"reasoning_content": "see."},
        {"content": "It rains."},
        {"tool_calls": [{"index": 0, "id": "call_1", "function": {"name": "weather", "arguments": '{"at":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ' "sea"}'}}]},
    ]
    chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    frames = [f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks] + ["data: [DONE]\n\n"]
    answer = {"content_type": "text/event-stream", "body": "".join(frames)}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer))
    say(page, "Weather?")
    shown = answered(page)
    assert shown.locator(".text").inner_text() == "It rains."
    fold = shown.locator("details.reasoning")
    assert fold.get_attribute("open") is None
    fold.locator("summary").click()
    assert fold.locator("div").inner_text() == "Let me see."
    called = json.loads(shown.locator("pre").inner_text())
    assert called[0]["function"] == {"name": "weather", "arguments": '{"at": "sea"}'}


def test_a_refusal_is_shown_and_the_next_message_goes_through(visit, server):
    window = visit(server)
    # The browser notes every status of this kind.
    window.provokes("400")
    page = window.live()
    page.click(".settings summary")
    page.fill("#max-tokens", "100000000")
    say(page, "Too much.")
    assert answered(page).get_attribute("data-state") == "failed"
    assert "max_tokens" in page.inner_text(".assistant .error")
    page.fill("#max-tokens", "3")
    say(page, "Less.")
    expect(page.locator(".assistant")).to_have_count(2)
    assert answered(page).get_attribute("data-state") == "done"


def test_a_key_is_asked_for_and_kept_for_the_tab_alone(start_server, visit):
    keyed = start_server("--api-key", "open-sesame", "--threads", "1")
    window = visit(keyed)
    window.provokes("401")
    page = window.page
    dialog = page.locator("#key-dialog")
    dialog.wait_for()
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.locator("#key-error").wait_for()
    page.fill("#key", "open-sesame")
    page.press("#key", "Enter")
    window.live()
    expect(dialog).to_be_hidden()
    expect(page.locator("#model")).not_to_be_empty()
    kept = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
    assert kept == [["open-sesame"], [], ""]
    say(page, "Hello")
    assert answered(page).get_attribute("data-state") == "done"
    page.reload()
    window.live()
    stranger = visit(keyed)
    stranger.provokes("401")
    stranger.page.locator("#key-dialog").wait_for()


def test_the_page_comes_back_when_the_server_does(start_server, visit):
    first = start_server("--threads", "1")
    window = visit(first)
    # The browser says so when it meets a connection that is refused or ends too soon.
    window.tolerates("ERR_CONNECTION_REFUSED|ERR_INCOMPLETE_CHUNKED|ERR_CONNECTION_RESET")
    window.live()
    assert first.stop() == 0, "an open page does not hold the server up"
    window.page.wait_for_selector("#link:not([data-state=live])")
    start_server("--threads", "1", port=first.port)
    window.live()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_one_side_is_shown_at_a_time(visit, server, scheme):
    page = visit(server, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, color_scheme=scheme).live()
    chat, engine = page.locator(".chat"), page.locator(".engine")
    for shown, hidden, name in ((chat, engine, "Chat"), (engine, chat, "Engine")):
        page.get_by_role("button", name=name, exact=True).click()
        expect(shown).to_be_visible()
        expect(hidden).to_be_hidden()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing sticks out"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((part) => part < 64)")
    assert dark == (scheme == "dark")


def test_everything_has_a_name_and_can_be_reached_by_keyboard(page):
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, canvas, [role]:not([role=status])")].filter((element) => {
            const label = element.labels?.[0]?.textContent ?? "";
            return !(element.getAttribute("aria-label") || element.textContent || label).trim();
        }).map((element) => element.outerHTML)"""
    )
    assert not nameless
    reached = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"theme", "log", "prompt", "send", "new-chat", "crowd"} <= reached
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_the_page_is_strict_and_can_be_left_out(server, start_server):
    answer = urllib.request.urlopen(f"{server.url}/", timeout=10)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';") and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    without = start_server("--disable-live-page", "--threads", "1")
    for path in ("/", "/page.js", "/live"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{without.url}{path}", timeout=10)
        assert refused.value.code == 404
        assert "--disable-live-page" in refused.value.read().decode()


def test_picture(start_server, visit, request):
    """Not a test: the page as it looks after half a minute of use, for the README."""
    server = start_server("--max-num-seqs", "8", "--threads", "1", "--block-size", "16", "--kv-cache-memory", "24MiB")
    page = visit(server).live()
    page.click(".settings summary")
    page.fill("#temperature", "0")
    page.click(".settings summary")
    say(page, "What is a KV cache?")
    answered(page)
    ask_for_long_answers(page)
    for _ in range(3):
        page.click("#crowd")
        page.wait_for_timeout(1500)
    once_begun(page, "click", length=210)
    say(page, "Tell me a story about a fox and a lantern.")
    page.locator(".assistant .receipt[data-known]").wait_for()
    for stopped in (True, False):
        expect(page.locator("#stop-all")).to_be_disabled(timeout=60_000)
        page.wait_for_timeout(700)
        page.click("#crowd")
        if stopped:
            page.wait_for_timeout(700)
            page.click("#stop-all")
        else:
            page.click("#crowd")
            page.wait_for_timeout(1500)
    page.mouse.click(640, 300)
    page.screenshot(path=request.config.getoption("--screenshot"))
    page.click("#stop-all")
    nothing_in_use(page)
