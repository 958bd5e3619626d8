// The engine at work: follows /live and shows what it says.

import { at, call, element, events, pause } from "./wire.js";
import { BlockMap, Curve, Palette, colourOf } from "./draw.js";

/** Without an event for so long, in milliseconds, the connection is made anew. */
const SILENCE = 6000;
/** How long a receipt may take to show up. */
const PATIENCE = 5000;
/** Latencies are those of the last so many seconds; throughput is that of one. */
const WINDOW = 4;

const palette = new Palette();
const past = [];
const waitingFor = new Map();
let lastAbort = -1;
let hovered = null;
let latest = null;
let map;
let curves;

const words = {
  seconds: (s) => (s < 0.001 ? `${Math.round(s * 1e6)} µs` : s < 1 ? `${+(s * 1e3).toPrecision(3)} ms` : `${+s.toPrecision(3)} s`),
  count: (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`,
};

/** What a receipt says. */
function receiptText(abort) {
  const freed = `${words.count(abort.blocks_freed, "block")} and ${words.count(abort.rows_freed, "row")} free after ${words.seconds(abort.seconds_to_free)}`;
  const where = { queued: "in the queue", prefill: "in prefill", decode: "in decode" }[abort.stage] ?? abort.stage;
  return `Aborted ${where}: ${freed}`;
}

/** The text of the receipt of the request whose id contains this one; nothing when none comes. */
export function receiptOf(id) {
  return new Promise((resolve) => {
    waitingFor.set(id, resolve);
    setTimeout(() => {
      waitingFor.delete(id);
      resolve(null);
    }, PATIENCE);
  });
}

/** The quantile `q` of what was counted between two readings of a histogram; `null` when that is nothing. Linear within a range. */
export function quantile(before, now, q) {
  const counts = now.counts.map((count, i) => count - (before?.counts[i] ?? 0));
  const all = counts.reduce((sum, count) => sum + count, 0);
  if (all <= 0) return null;
  let rest = q * all;
  for (let i = 0; i < counts.length; i += 1) {
    if (rest <= counts[i] && counts[i] > 0) {
      const low = i ? now.bounds[i - 1] : 0;
      const high = now.bounds[i] ?? low;
      return low + (high - low) * (rest / counts[i]);
    }
    rest -= counts[i];
  }
  return now.bounds.at(-1);
}

/** The newest reading that is at least so old, or else the oldest. */
function before(seconds, now) {
  const old = past.findLast((stats) => stats.uptime_seconds <= now.uptime_seconds - seconds);
  return old ?? past[0] ?? now;
}

function showStats(stats) {
  // Another engine answers: what was known of the last one says nothing about it.
  if (past.length && stats.uptime_seconds < past.at(-1).uptime_seconds) {
    past.length = 0;
    lastAbort = -1;
    Object.values(curves).forEach((curve) => (curve.points.length = 0));
  }
  const second = before(1, stats);
  const spell = before(WINDOW, stats);
  const elapsed = stats.uptime_seconds - second.uptime_seconds;
  const rate = elapsed > 0 ? (stats.generation_tokens_total - second.generation_tokens_total) / elapsed : 0;
  const since = (name, q) => quantile(spell[name], stats[name], q);
  const ttft = since("time_to_first_token_seconds", 0.5);
  const [p50, p99] = [0.5, 0.99].map((q) => since("inter_token_latency_seconds", q));
  past.push(stats);
  while (past.length > 2 && past[1].uptime_seconds < stats.uptime_seconds - 2 * WINDOW) past.shift();
  const ms = (seconds) => (seconds === null ? null : seconds * 1e3);
  curves.rate.push(stats.uptime_seconds, rate);
  curves.ttft.push(stats.uptime_seconds, ms(ttft));
  curves.itl.push(stats.uptime_seconds, ms(p50), ms(p99));
  at("rate").textContent = `${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`;
  at("ttft").textContent = ttft === null ? "–" : words.seconds(ttft);
  at("itl").textContent = p50 === null ? "–" : `${words.seconds(p50)} · ${words.seconds(p99)}`;
  for (const state of ["owned", "cached", "free"]) at(state).textContent = stats.kv_blocks[state];
  at("aborted").textContent = stats.requests_aborted_total;
  const { owned, cached, free } = stats.kv_blocks;
  map.canvas.setAttribute("aria-label", `KV blocks: ${owned} in use, ${cached} cached, ${free} free`);
}

function showRow(row, slot) {
  const line = element("tr");
  const name = element("td", "name");
  const dot = element("i");
  dot.style.background = colourOf(slot);
  const label = row.index ? `${row.request_id} #${row.index}` : row.request_id;
  // What tells ids apart stands at their end.
  name.append(dot, element("span", "", label.length > 25 ? `…${label.slice(-24)}` : label));
  name.title = label;
  const stage = element("td");
  stage.append(element("span", `stage ${row.stage}`, row.stage));
  // While a prompt is read, how far; then how much was generated.
  const reads = row.stage === "prefill";
  const tokens = reads ? `${row.computed_tokens} / ${row.prompt_tokens}` : `${row.prompt_tokens} + ${row.completion_tokens}`;
  line.append(name, stage, element("td", "number", tokens), element("td", "number", String(row.kv_blocks)));
  return line;
}

function showActivity(activity) {
  const { rows, waiting, blocks } = activity;
  const slots = palette.assign(rows.map((row) => `${row.request_id}\n${row.index}`));
  map.show(blocks.runs, slots);
  at("running").textContent = `${rows.length + activity.rows_left_out} of ${activity.max_num_seqs}`;
  at("rows").replaceChildren(...rows.map((row, i) => showRow(row, slots[i])));
  at("no-rows").hidden = rows.length > 0;
  at("waiting").textContent = activity.num_waiting;
  const chips = waiting.slice(0, 6).map((waiter) => {
    const chip = element("span", "chip", `${waiter.prompt_tokens + waiter.completion_tokens} tokens`);
    chip.title = waiter.request_id;
    return chip;
  });
  if (activity.num_waiting > chips.length && chips.length) chips.push(element("span", "chip", `+${activity.num_waiting - chips.length}`));
  at("queue").replaceChildren(...chips);
  showAborts(activity);
  describeHovered();
}

function showAborts({ aborts, uptime_seconds }) {
  for (const abort of aborts.filter((abort) => abort.number > lastAbort)) {
    lastAbort = abort.number;
    for (const [id, resolve] of waitingFor) {
      if (abort.request_id.includes(id)) {
        waitingFor.delete(id);
        resolve(receiptText(abort));
      }
    }
  }
  const items = aborts.toReversed().map((abort) => {
    const item = element("li");
    const head = element("p");
    const age = Math.max(0, Math.round(uptime_seconds - abort.at_uptime_seconds));
    head.append(element("span", `stage ${abort.stage}`, abort.stage), element("b", "", words.seconds(abort.seconds_to_free)));
    head.append(element("span", "faint", age < 100 ? `${age} s ago` : `${Math.round(age / 60)} min ago`));
    const freed = `${words.count(abort.blocks_freed, "block")}, ${words.count(abort.rows_freed, "row")}, ${words.count(abort.completion_tokens, "token")}`;
    const cause = abort.cause === "dropped" ? "client left" : "called for";
    item.append(head, element("p", "faint", `${freed} · ${cause}`));
    item.title = abort.request_id;
    return item;
  });
  at("receipts").replaceChildren(...items);
  at("no-receipts").hidden = items.length > 0;
}

/** Says of the cell under the pointer what it is. */
function describeHovered() {
  const { blocks, rows } = latest.activity;
  const per = blocks.blocks_per_cell;
  let note = per > 1 ? `${blocks.total}, ${per} to a square` : `${blocks.total}`;
  const state = hovered === null ? undefined : map.cells[hovered];
  if (state !== undefined) {
    const row = rows[state - 3];
    const what = row ? row.request_id : ["free", "cached", "in use"][state];
    note = per > 1 ? `from ${hovered * per}: ${what}` : `${hovered}: ${what}`;
  }
  at("map-note").textContent = note;
}

function show(event) {
  latest = event;
  showStats(event.stats);
  showActivity(event.activity);
}

function link(state, text) {
  at("link").dataset.state = state;
  at("link").textContent = text;
}

/** Follows the engine as long as the page is open and can be seen. */
async function follow() {
  let wait = 500;
  for (;;) {
    while (document.hidden) await new Promise((go) => document.addEventListener("visibilitychange", go, { once: true }));
    const abort = new AbortController();
    const hide = () => document.hidden && abort.abort();
    document.addEventListener("visibilitychange", hide);
    let timer;
    try {
      const response = await call("live", { signal: abort.signal });
      const patience = () => {
        clearTimeout(timer);
        timer = setTimeout(() => abort.abort(), SILENCE);
      };
      patience();
      for await (const data of events(response)) {
        patience();
        link("live", "live");
        wait = 500;
        show(JSON.parse(data));
      }
      link("waiting", "reconnecting");
    } catch (error) {
      link("waiting", error.status === 503 ? "the model is loading" : error.status ? error.message : "reconnecting");
    } finally {
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", hide);
    }
    await pause(wait);
    wait = Math.min(wait * 2, 8000);
  }
}

/** Draws everything again, in colours that have changed. */
export function redraw() {
  map.draw();
  Object.values(curves).forEach((curve) => curve.draw());
  if (latest) showActivity(latest.activity);
}

/** Makes the right side work. */
export function wireEngine() {
  map = new BlockMap(at("map"));
  curves = {
    rate: new Curve(at("rate-curve"), ["tokens"], "tokens/s"),
    ttft: new Curve(at("ttft-curve"), ["p50"], "ms"),
    itl: new Curve(at("itl-curve"), ["p50", "p99"], "ms"),
  };
  at("map").addEventListener("pointermove", (event) => {
    hovered = map.cellAt(event.offsetX, event.offsetY);
    if (latest) describeHovered();
  });
  at("map").addEventListener("pointerleave", () => {
    hovered = null;
    if (latest) describeHovered();
  });
  follow();
}
