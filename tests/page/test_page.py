"""The page in a real browser, told of a fleet of paper: what it shows as it happens, and to whom it can be shown."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from pdctl.dialects import page as dialect
from tests.page.planted import Fleet, Told, blocked, instance, link, planted, report, session_of
from tests.page.window import Chromium, Scheme, Window


@asynccontextmanager
async def shown(browser: Chromium, fleet: Fleet | None = None, **how: Any) -> AsyncIterator[tuple[Told, Window]]:
    """The page of `fleet`, open, live, and without a complaint at its end."""
    async with planted(fleet) as (told, url), browser.window(**how) as window:
        await window.open(url)
        await window.sees("live", "#link")
        yield told, window
        assert window.complaints == []


# --- the document


async def test_the_page_is_one_document_that_asks_nobody_else() -> None:
    document, headers = dialect.page()
    text = document.decode()
    assert set(re.findall(r"https?://[^'\"\s)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", text)
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; connect-src 'self'; ")
    assert "unsafe" not in headers["Content-Security-Policy"]


async def test_head_says_the_same_and_who_has_the_page_need_not_take_it_again() -> None:
    async with planted() as (_, url), aiohttp.ClientSession() as http:
        async with http.get(url) as got, http.head(url) as head:
            assert (got.status, head.status) == (200, 200)
            assert await head.read() == b""
            assert head.headers["ETag"] == got.headers["ETag"]
            assert head.headers["Content-Length"] == str(len(await got.read()))
            assert got.headers["Cache-Control"] == "no-cache"
        async with http.get(url, headers={"If-None-Match": got.headers["ETag"]}) as again:
            assert (again.status, await again.read()) == (304, b"")


async def test_the_browser_holds_the_page_to_its_policy(browser: Chromium) -> None:
    async with planted() as (_, url), planted() as (_, elsewhere), browser.window() as window:
        await window.open(url)
        await window.sees("live", "#link")
        ask = "url => fetch(url, { mode: 'no-cors' }).then(() => 'reached', () => 'refused')"
        assert await window.ask(ask, f"{url}/livez") == "reached"
        assert await window.ask(ask, f"{elsewhere}/livez") == "refused"
        markup = "() => { try { document.body.innerHTML = '<b>x</b>'; return 'taken'; } catch { return 'refused'; } }"
        assert await window.ask(markup) == "refused"
        script = """() => { const script = document.createElement('script');
            try { script.textContent = 'window.ran = true'; document.head.append(script); } catch {}
            return window.ran === true; }"""
        assert await window.ask(script) is False


# --- what happens, as it happens


async def test_seats_fill_as_ranks_register(browser: Chromium) -> None:
    fleet = Fleet()
    fleet.instances["prefill-0"] = instance("prefill-0", "prefill", 0, 4, missing=[1, 2, 3])
    async with shown(browser, fleet) as (told, window):
        await window.sees("prefill-0 cannot serve: 3 of 4 seats missing (tp1, tp2, tp3)", "#problems")
        told.say("instance", instance("prefill-0", "prefill", 0, 4, missing=[3]))
        await window.sees("1 of 4 seats missing (tp3)", "#problems")
        await window.sees("3/4", "#fleet")
        told.say("instance", instance("prefill-0", "prefill", 0, 4))
        told.happens("completed", "prefill-0 is complete: 4 of 4 seats", instance="prefill-0")
        await window.sees("Everything serves", "#verdict")
        await window.sees("completed · prefill-0", "#events")
        assert await window.ask("() => document.querySelectorAll('#fleet .seat.alive').length") == 5


async def test_a_rank_that_misses_a_renewal_and_is_gone_is_shown(browser: Chromium) -> None:
    async with shown(browser, Fleet(tp=2)) as (told, window):
        told.say("instance", instance("decode-0", "decode", 0, 2, suspect=[1]))
        await window.sees("decode-0: tp1 missed a renewal", "#problems")
        told.say("instance", {"name": "decode-0", "gone": True})
        await window.misses("decode-0", "#fleet")


async def test_an_ejection_and_the_recovery_are_shown_with_their_cause(browser: Chromium) -> None:
    fleet = Fleet(prefills=2, decodes=2)
    async with shown(browser, fleet) as (told, window):
        await window.sees("Everything serves", "#verdict")
        told.say("report", fleet.block(0, 1))
        told.happens("ejected", "decode-1 is blocked: timed out", instance="prefill-0", rank="tp0")
        await window.sees("decode-1/tp0 is blocked at 1 of 2 prefill ranks: timed out", "#problems")
        await window.sees("one of 12 blocks did not move for 1.0 s", "#out")
        await window.sees("1", "#tile-links")
        await window.sees("ejected · prefill-0/tp0", "#events")
        assert await window.ask("() => document.title") == "(1) pdctl"
        told.say("report", fleet.trust(0, 1))
        told.happens("readmitted", "decode-1 is trusted again", instance="prefill-0", rank="tp0")
        await window.sees("Everything serves", "#verdict")
        await window.sees("None: every link that is used is trusted.", "#out-empty")
        await window.sees("readmitted · prefill-0/tp0", "#events")


async def test_a_tab_that_nobody_looks_at_still_tells_by_its_title(browser: Chromium) -> None:
    fleet = Fleet()
    async with shown(browser, fleet) as (told, window):
        await window.sees("Everything serves", "#verdict")
        hide = """() => { Object.defineProperty(document, 'hidden', { configurable: true, get: () => true });
            window.frames_of = window.requestAnimationFrame; window.requestAnimationFrame = () => 0; }"""
        await window.ask(hide)
        told.say("report", fleet.block(0, 0))
        await window.comes("document.title === '(1) pdctl'")
        assert "Everything serves" in await window.text("#verdict")
        show = """() => { window.requestAnimationFrame = window.frames_of; delete document.hidden;
            document.dispatchEvent(new Event('visibilitychange')); }"""
        await window.ask(show)
        await window.sees("One thing is broken", "#verdict")


async def test_a_prefill_that_refuses_everybody_is_the_suspect_itself(browser: Chromium) -> None:
    fleet = Fleet(prefills=2, decodes=3)
    for decode in range(3):
        fleet.block(0, decode)
    async with shown(browser, fleet) as (_, window):
        await window.sees("prefill-0/tp0 refuses all 3 decode ranks: timed out", "#problems")
        await window.sees("One thing is broken", "#verdict")


async def test_a_block_of_a_rank_that_was_replaced_is_a_note_and_no_trouble(browser: Chromium) -> None:
    fleet = Fleet(decodes=2)
    fleet.reports["prefill-0", 0]["links"].append(blocked("10.9.9.9:15001"))
    async with shown(browser, fleet) as (told, window):
        await window.sees("10.9.9.9:15001 is refused by prefill-0/tp0, and no registered rank has that", "#problems")
        await window.sees("Everything serves", "#verdict")
        await window.sees("1 to ranks that are gone", "#tile-links-sub")
        for name in ("decode-0", "decode-1"):  # where no decode registers, it is all that is known of them
            told.say("instance", {"name": name, "gone": True})
            told.say("report", {"instance": name, "seat": "tp0", "gone": True})
        await window.sees("10.9.9.9:15001 is blocked at prefill-0/tp0: timed out", "#problems")


async def test_the_cause_of_a_link_is_told_on_hover(browser: Chromium) -> None:
    fleet = Fleet(prefills=2, decodes=2)
    fleet.block(1, 1)
    async with shown(browser, fleet) as (_, window):
        await window.sees("blocked", "#out")
        await window.do(lambda page: page.hover("#map", position={"x": 150 + 26 + 12, "y": 92 + 26 + 12}))
        await window.sees("prefill-1/tp0 → decode-1/tp0: blocked: timed out", "#tip")
        await window.do(lambda page: page.hover("h1"))
        await window.misses("prefill-1", "#tip")


async def test_rooms_are_shown_by_phase_and_their_numbers_are_whole(browser: Chromium) -> None:
    fleet = Fleet()
    sentence = "one of 12 blocks did not move for 1.0 s: the peer hangs"
    fleet.reports["prefill-0", 0] = report(
        "prefill-0", "prefill", 0, 0, [link(session_of("decode", 0, 0))],
        rooms={"sender": {"bootstrapping": 3, "waiting_for_input": 1, "transferring": 2}},
        open=[{"room": 9007199254740993, "side": "sender", "phase": "transferring", "age_s": 9.0, "peer": None}],
        failed=[{"room": 2**63 - 1, "side": "sender", "age_s": 3.0, "seconds": 1.0, "cause": "timed_out",
                 "sentence": sentence, "peer": None}],
    )  # fmt: skip
    async with shown(browser, fleet) as (_, window):
        await window.sees("prefill, sending\t3\t1\t2", "#phases")
        await window.sees("9007199254740993", "#open")
        await window.sees("9223372036854775807", "#failed")
        await window.sees(sentence, "#failed")
        await window.sees("1 room failed in the last minute, mostly: timed out", "#problems")


async def test_a_hundred_rooms_that_say_the_same_are_one_line(browser: Chromium) -> None:
    async with shown(browser) as (told, window):
        told.happens("seated", "decode-0 tp0: seat taken", instance="decode-0", rank="tp0")
        for n in range(100):
            told.happens(
                "room_failed", f"room {n} failed at prefill-0 tp0: timed out", instance="prefill-0", rank="tp0"
            )
        about = {"instance": "prefill-0", "rank": "tp0", "session": session_of("decode", 0, 0)}
        told.happens("ejected", "session ejected: see whether that process runs", **about)
        await window.sees("ejected · prefill-0/tp0 → decode-0/tp0", "#events")
        await window.sees("room failed · prefill-0/tp0 · 100 times", "#events")
        await window.sees("room 99 failed", "#events")
        assert await window.do(lambda page: page.locator("#events li").count()) == 3


async def test_throughput_is_what_reports_differ_by(browser: Chromium) -> None:
    fleet = Fleet()
    async with planted(fleet) as (told, url), browser.window() as window:
        await window.do(lambda page: page.clock.install())
        await window.open(url)
        await window.sees("live", "#link")
        await window.do(lambda page: page.clock.run_for(5000))
        row = fleet.reports["prefill-0", 0]
        told.say("report", row | {"bytes": row["bytes"] + 5 * 10**9})
        await window.ask("() => new Promise(done => setTimeout(done, 50))")
        await window.do(lambda page: page.clock.run_for(9000))
        await window.sees("MB/s sent, 0 B/s arrived", "#tile-moving-sub")
        words = await window.text("#chart-words")
        assert re.search(r"sent by prefills: .* (1\.\d GB|[789]\d\d MB)/s at most, 5\.0 GB in", words), words


async def test_an_event_that_counts_again_takes_its_own_place(browser: Chromium) -> None:
    async with shown(browser) as (told, window):
        told.happens("refused", "page_size is 64 and this rank offers 16", instance="prefill-0")
        told.happens("seated", "decode-0 tp0: seat taken", instance="decode-0", rank="tp0")
        told.say("event", told.fleet.events[0] | {"count": 7})
        await window.sees("refused · prefill-0 · 7 times", "#events")
        heads = await window.do(lambda page: page.locator("#events .head").all_inner_texts())
        assert heads == ["seated · decode-0/tp0", "refused · prefill-0 · 7 times"]


@pytest.mark.parametrize(
    ("about", "words", "grade"),
    [
        ({"unready": ["not registered at http://r:8998"]}, "prefill-0/tp0 is not ready: not registered at", "warn"),
        ({"panicking": ["group"]}, "prefill-0/tp0: most of its links are blocked, so it uses them all the same", "bad"),
        ({"doubt": True}, "prefill-0/tp0 doubts itself", "warn"),
        ({"quarantined": 60}, "prefill-0/tp0: 60 pages in quarantine", "info"),
        ({"store": {"attached": False, "sentence": "the master is down"}}, "has no store: the master is down", "warn"),
    ],
    ids=["unready", "panic", "doubt", "quarantine", "store"],
)
async def test_what_a_rank_says_of_itself_is_graded(
    browser: Chromium, about: dict[str, Any], words: str, grade: str
) -> None:
    fleet = Fleet()
    fleet.reports["prefill-0", 0] |= about
    async with shown(browser, fleet) as (_, window):
        await window.sees(words, f"#problem-list .{grade} .what")


async def test_a_registry_in_trouble_says_so(browser: Chromium) -> None:
    async with shown(browser) as (told, window):
        told.say(
            "service", told.fleet.overview()["service"] | {"unready": ["the journal takes no rows"], "age_s": 40.0}
        )
        await window.sees("The registry is not ready: the journal takes no rows", "#problems")
        await window.sees("The registry answers from what it knew 40 s ago", "#problems")
        told.say("service", told.fleet.overview()["service"])
        await window.sees("Everything serves", "#verdict")


# --- when the registry is not there


async def test_a_registry_that_falls_silent_is_said_and_found_again(browser: Chromium) -> None:
    fleet = Fleet()
    async with browser.window() as window:
        async with planted(fleet) as (told, url):
            told.happens("seated", "what was before", instance="prefill-0")
            await window.open(url)
            await window.sees("what was before", "#events")
        await window.sees("no word from the registry for", "#link")
        await window.sees("prefill-0", "#fleet")  # the last picture stays
        assert await window.ask("() => document.title") == "(?) pdctl"
        fleet.instances["decode-1"] = instance("decode-1", "decode", 1, 1)
        fleet.events.clear()
        async with planted(fleet, int(url.rpartition(":")[2])) as (told, _):
            await window.sees("live", "#link")
            await window.sees("decode-1", "#fleet")
            await window.misses("what was before", "#events")  # another registry counts anew


async def test_a_stream_that_says_nothing_is_taken_for_dead_and_asked_again(browser: Chromium) -> None:
    async with planted() as (told, url), browser.window() as window:
        await window.do(lambda page: page.clock.install())
        await window.open(url)
        await window.sees("live", "#link")
        await window.do(lambda page: page.clock.run_for(15_000))
        assert told.n_came == 1
        await window.do(lambda page: page.clock.run_for(3_000))
        await window.sees("no word from the registry for", "#link")
        await window.do(lambda page: page.clock.run_for(1_000))
        await window.sees("live", "#link")
        assert told.n_came >= 2


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((403, "10.9.9.9 is outside of the trusted networks: come from inside of them"), "outside of the trusted"),
        ((429, "1000 watchers are connected, the limit (max_watchers): close one"), "1000 watchers are connected"),
    ],
    ids=["untrusted", "too many"],
)
async def test_who_is_refused_reads_why(browser: Chromium, refusal: tuple[int, str], words: str) -> None:
    async with planted() as (told, url), browser.window() as window:
        told.refusal = refusal
        await window.open(url)
        await window.sees(words, "#link")
        told.refusal = None
        await window.sees("live", "#link")


async def test_a_token_is_asked_for_and_kept_in_this_tab_alone(browser: Chromium) -> None:
    async with planted() as (told, url), browser.window() as window:
        told.token = "s3cret-s3cret-s3cret"
        await window.open(url)
        await window.sees("This registry wants a token", "#ask")
        assert not await window.do(lambda page: page.is_visible("main"))
        for token, words in (("wrong-wrong-wrong", "this path needs a token"), (told.token, "live")):
            await window.do(lambda page, token=token: page.fill("#token", token))  # type: ignore[misc]
            await window.do(lambda page: page.press("#token", "Enter"))
            await window.sees(words)
        await window.sees("Everything serves", "#verdict")
        kept = "() => [sessionStorage.length, localStorage.length, document.cookie]"
        assert await window.ask(kept) == [1, 0, ""]
        assert await window.do(lambda page: page.input_value("#token")) == ""
        await window.do(lambda page: page.reload())
        await window.sees("live", "#link")
        await window.do(lambda page: page.click("#forget"))
        await window.sees("This registry wants a token", "#ask")
        assert await window.ask("() => sessionStorage.length") == 0


# --- what ranks say is text


async def test_nothing_that_a_rank_says_is_markup(browser: Chromium) -> None:
    fleet, evil = Fleet(), '<img src=x onerror="window.ran = 1"><script>window.ran = 1</script>'
    fleet.instances["decode-9"] = instance("decode-9", evil, 9, 1, dead=True, health=evil)
    fleet.reports["prefill-0", 0]["unready"] = [evil]
    fleet.reports["prefill-0", 0]["links"] = [link(evil, "blocked", cause="timed_out", sentence=evil)]
    async with shown(browser, fleet) as (told, window):
        told.happens("refused", evil, instance="prefill-0", peer=evil)
        await window.sees(evil, "#events")
        for place in ("#problems", "#fleet", "#out"):
            await window.sees(evil, place)
        assert await window.ask("() => [window.ran, document.images.length, document.scripts.length]") == [None, 0, 1]


# --- thousands of ranks


async def test_three_thousand_ranks_are_readable(browser: Chromium) -> None:
    fleet = Fleet(prefills=188, decodes=187, tp=8, links=16)
    fleet.block(7, 9, 3)
    fleet.instances["decode-42"] = instance("decode-42", "decode", 42, 8, missing=[5])
    async with shown(browser, fleet) as (told, window):
        await window.sees("2999 of 3000", "#tile-seats")
        await window.sees("decode-42 cannot serve: 1 of 8 seats missing (tp5)", "#problems")
        await window.sees("decode-9/tp3 is blocked at 1 of 1504 prefill ranks", "#problems")
        assert await window.ask("() => document.querySelectorAll('*').length") < 3000
        assert await window.do(lambda page: page.locator("#fleet button").first.inner_text()) == "decode-42"
        await window.ask("() => document.querySelector('#fleet-box').scrollTo(0, 1e9)")
        await window.sees("prefill-187", "#fleet")
        told.say("report", fleet.trust(7, 9, 3))
        await window.misses("decode-9/tp3", "#problems")
        await window.do(lambda page: page.fill("#filter", "prefill-77"))
        await window.misses("decode-0", "#fleet")
        await window.sees("prefill-77", "#fleet")


async def test_the_matrix_of_thousands_is_by_instance_until_ranks_are_asked_for(browser: Chromium) -> None:
    fleet = Fleet(prefills=40, decodes=40, tp=4, links=40)
    fleet.block(3, 5, 2)
    async with shown(browser, fleet) as (_, window):
        await window.do(lambda page: page.focus("#map"))
        await window.do(lambda page: page.keyboard.press("PageDown"))
        await window.sees("prefill-3 → decode-5: 1 blocked, 3 trusted of 4 links", "#cell")
        await window.do(lambda page: page.select_option("#level", "rank"))
        await window.do(lambda page: page.focus("#map"))
        await window.do(lambda page: page.keyboard.press("PageDown"))
        await window.sees("prefill-3/tp2 → decode-5/tp2: blocked: timed out", "#cell")


# --- for everybody


async def test_the_matrix_can_be_read_by_keyboard_and_is_spoken(browser: Chromium) -> None:
    fleet = Fleet(prefills=2, decodes=3)
    fleet.block(1, 2)
    async with shown(browser, fleet) as (_, window):
        await window.do(lambda page: page.focus("#map"))
        for key, words in (
            ("ArrowRight", "prefill-0/tp0 → decode-1/tp0: trusted"),
            ("ArrowDown", "prefill-1/tp0 → decode-1/tp0: trusted"),
            ("End", "prefill-1/tp0 → decode-2/tp0: blocked: timed out"),
            ("Home", "prefill-1/tp0 → decode-0/tp0: trusted"),
            ("PageDown", "prefill-1/tp0 → decode-2/tp0: blocked: timed out"),
        ):
            await window.do(lambda page, key=key: page.keyboard.press(key))  # type: ignore[misc]
            await window.sees(words, "#cell")
            assert words in await window.ask("() => document.querySelector('#said-cell').textContent")


async def test_the_matrix_is_a_table_for_those_who_see_no_map(browser: Chromium) -> None:
    fleet = Fleet(prefills=2, decodes=2)
    fleet.block(1, 0)
    async with shown(browser, fleet) as (told, window):
        await window.do(lambda page: page.check("#as-table"))
        await window.sees("prefill-1/tp0\t× blocked\ttrusted", "#grid")
        told.say("report", fleet.trust(1, 0))
        await window.sees("prefill-1/tp0\ttrusted\ttrusted", "#grid")
        assert not await window.do(lambda page: page.is_visible("#map"))


async def test_what_happens_is_announced_once_and_storms_are_one_sentence(browser: Chromium) -> None:
    async with shown(browser) as (told, window):
        said = "() => document.querySelector('#said[role=status][aria-live=polite]').textContent"
        told.happens("ejected", "decode-0 is blocked at prefill-0: timed out")
        await window.comes(f"({said})().includes('decode-0 is blocked')")
        for n in range(40):
            told.happens("expired", f"prefill-{n} is gone")
        await window.comes(f"/And [0-9]+ more events/.test(({said})())")


async def test_focus_stays_with_an_instance_that_moves_in_the_list(browser: Chromium) -> None:
    async with shown(browser, Fleet(prefills=3, decodes=3)) as (told, window):
        await window.sees("prefill-2", "#fleet")
        await window.do(lambda page: page.get_by_role("button", name="prefill-2").press("Enter"))
        await window.sees("prefill-2: 1 of 1 seats held", "#detail")
        told.say("instance", instance("prefill-2", "prefill", 2, 1, missing=[0]))
        await window.sees("1 missing", "#fleet")
        focused = "() => [document.activeElement.innerText, document.activeElement.closest('tr').rowIndex]"
        assert await window.ask(focused) == ["prefill-2", 2]  # below the head and the spacer: the first of all
        await window.do(lambda page: page.keyboard.press("ArrowDown"))
        assert (await window.ask(focused))[0] == "decode-0"


async def test_the_open_instance_is_part_of_the_address(browser: Chromium) -> None:
    async with planted(Fleet(tp=2)) as (_, url), browser.window() as window:
        await window.open(f"{url}/#instance=decode-0")
        await window.sees("decode-0: 2 of 2 seats held", "#detail")
        await window.sees("10.2.0.1:15002", "#ranks")


NAMELESS = """() => [...document.querySelectorAll('button, input, select, table, canvas, svg, [role=region], section')]
    .filter((each) => each.checkVisibility())
    .filter((each) => !(each.ariaLabel || each.getAttribute('aria-labelledby') || each.closest('label') || each.caption
        || each.innerText || (each.labels || []).length || each.closest('[aria-labelledby]')))
    .map((each) => each.outerHTML.slice(0, 100))"""

DANGLING = """() => ['aria-labelledby', 'aria-describedby', 'aria-controls', 'for'].flatMap((name) =>
    [...document.querySelectorAll(`[${name}]`)].filter((each) => !document.getElementById(each.getAttribute(name)))
    .map((each) => each.outerHTML.slice(0, 100)))"""

UNREACHED = """() => [...document.querySelectorAll('.box')].filter((each) => each.checkVisibility())
    .filter((each) => each.scrollHeight > each.clientHeight + 1)
    .filter((each) => each.tabIndex !== 0 && !each.querySelector('[tabindex="0"]'))
    .map((each) => each.id)"""

TOO_FAINT = """() => {
    const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    const rgb = (colour) => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const linear = (c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
    const light = (colour) => colour.slice(0, 3).map((c) => linear(c / 255))
        .reduce((all, c, i) => all + c * [.2126, .7152, .0722][i], 0);
    const behind = (element) => {
        for (let each = element; each; each = each.parentElement) {
            const colour = rgb(getComputedStyle(each).backgroundColor);
            if (colour[3] === 255) return colour;
        }
        return [255, 255, 255];
    };
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
    while (texts.nextNode()) {
        const element = texts.currentNode.parentElement;
        if (!texts.currentNode.data.trim() || !element.checkVisibility()) continue;
        if (element.closest('.hidden, script, style')) continue;
        const [a, b] = [light(rgb(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
        const ratio = (a + .05) / (b + .05);
        if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${texts.currentNode.data.trim().slice(0, 40)}`);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_everything_has_a_name_and_can_be_read_in_either_scheme(browser: Chromium, scheme: Scheme) -> None:
    fleet = Fleet(prefills=2, decodes=2, tp=2)
    fleet.block(0, 1)
    fleet.reports["prefill-1", 0]["links"][0].update(state="trial", cause="peer_gone", sentence="on trial")
    fleet.reports["prefill-1", 1]["links"][1].update(state="dropped", cause="replaced", sentence="another life")
    fleet.instances["decode-1"] = instance("decode-1", "decode", 1, 2, missing=[0], suspect=[1])
    async with shown(browser, fleet, scheme=scheme) as (told, window):
        for kind in ("ejected", "on_trial", "seated", "dropped", "draining"):
            told.happens(kind, f"this was {kind}")
        await window.sees("this was draining", "#events")
        await window.do(lambda page: page.get_by_role("button", name="decode-1").click())
        await window.sees("decode-1: 1 of 2 seats held", "#detail")
        assert await window.ask(NAMELESS) == []
        assert await window.ask(DANGLING) == []
        assert await window.ask(UNREACHED) == []
        assert await window.ask(TOO_FAINT) == []
        ground = await window.ask("() => getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(244, 245, 246)", "dark": "rgb(17, 20, 24)"}[scheme]


async def test_the_tab_key_goes_the_way_that_the_eye_goes(browser: Chromium) -> None:
    async with shown(browser, Fleet(prefills=2, decodes=2)) as (_, window):
        await window.sees("decode-0", "#fleet")
        stops = []
        for _ in range(14):
            await window.do(lambda page: page.keyboard.press("Tab"))
            stops.append(await window.ask("() => document.activeElement.id || document.activeElement.innerText"))
        assert stops[:6] == ["Skip to what is wrong", "filter", "fleet-box", "decode-0", "decode-1", "prefill-0"]
        assert stops[7:10] == ["level", "as-table", "map"]


async def test_a_phone_shows_it_without_scrolling_sideways(browser: Chromium) -> None:
    fleet = Fleet(prefills=3, decodes=3, tp=8)
    fleet.block(0, 1)
    async with shown(browser, fleet, width=360, height=740) as (_, window):
        await window.sees("decode-1/tp0 is blocked", "#problems")
        assert await window.ask("() => document.documentElement.scrollWidth") == 360


async def test_the_page_does_not_draw_while_nobody_has_told_it_anything(browser: Chromium) -> None:
    async with planted() as (told, url), browser.window() as window:
        told.refusal = (404, "no such path")
        await window.open(url)
        await window.sees("it is of another version than this page", "#link")
        assert not await window.do(lambda page: page.is_visible("main"))
        await asyncio.sleep(0)
