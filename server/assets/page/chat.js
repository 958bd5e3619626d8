// The chat: one conversation, streamed; Stop closes the connection, and the engine's receipt says what that freed.

import { at, call, element, events } from "./wire.js";

/** A request id that the engine's receipt can be found by. */
export const newId = (kind) => `page-${kind}-${crypto.getRandomValues(new Uint32Array(1))[0].toString(16).padStart(8, "0")}`;

const HISTORY = [];
const IDEAS = ["Tell me a story about a fox and a lantern.", "What is a KV cache?", "Write a short story about Mia and a dragon."];

let running = null;

let known = null;

/** The name of the served model. */
export function modelName() {
  known ??= call("v1/models").then((response) => response.json()).then((list) => list.data[0].id);
  known.catch(() => (known = null));
  return known;
}

function settings() {
  const extra = {};
  if (at("temperature").value !== "") extra.temperature = at("temperature").valueAsNumber;
  if (at("max-tokens").value !== "") extra.max_tokens = at("max-tokens").valueAsNumber;
  return extra;
}

/** An answer on the screen, and what it consists of. */
class Answer {
  constructor() {
    this.text = "";
    this.reasoning = "";
    this.calls = [];
    this.usage = null;
    this.box = element("article", "message assistant");
    this.box.setAttribute("aria-label", "Answer");
    this.body = element("div", "text waiting");
    this.meta = element("p", "meta");
    this.box.append(this.body, this.meta);
    this.asked = performance.now();
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message ?? String(chunk.error));
    this.usage = chunk.usage ?? this.usage;
    const delta = chunk.choices?.[0]?.delta ?? {};
    this.finish = chunk.choices?.[0]?.finish_reason ?? this.finish;
    if (delta.content || delta.reasoning_content || delta.reasoning || delta.tool_calls) {
      this.first ??= performance.now();
      this.body.classList.remove("waiting");
    }
    if (delta.content) {
      this.text += delta.content;
      this.body.textContent = this.text;
    }
    this.think(delta.reasoning_content ?? delta.reasoning ?? "");
    for (const call of delta.tool_calls ?? []) this.callTool(call);
  }

  think(more) {
    if (!more) return;
    if (!this.thoughts) {
      const fold = element("details", "reasoning");
      this.thoughts = element("div");
      fold.append(element("summary", "", "Reasoning"), this.thoughts);
      this.body.before(fold);
    }
    this.reasoning += more;
    this.thoughts.textContent = this.reasoning;
  }

  callTool(delta) {
    const call = (this.calls[delta.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    call.id ||= delta.id ?? "";
    call.function.name ||= delta.function?.name ?? "";
    call.function.arguments += delta.function?.arguments ?? "";
    this.tools ??= this.body.parentElement.insertBefore(element("pre", "tools"), this.meta);
    this.tools.textContent = JSON.stringify(this.calls, null, 2);
  }

  say(...parts) {
    const seconds = this.first && (performance.now() - this.first) / 1000;
    const tokens = this.usage?.completion_tokens;
    const facts = parts.filter(Boolean);
    if (this.first) facts.push(`first token after ${Math.round(this.first - this.asked)} ms`);
    if (tokens > 1 && seconds > 0) facts.push(`${tokens} tokens`, `${((tokens - 1) / seconds).toFixed(0)} tokens/s`);
    this.meta.textContent = facts.join(" · ");
    this.body.classList.remove("waiting");
    this.box.dataset.state = "done";
  }

  fail(error) {
    this.body.classList.remove("waiting");
    this.box.append(element("p", "error", error.message));
    this.box.dataset.state = "failed";
  }

  /** As the next request says it. */
  message() {
    const message = { role: "assistant", content: this.text };
    if (this.calls.length) message.tool_calls = this.calls;
    return message;
  }
}

function show(box) {
  const log = at("log");
  at("welcome").hidden = true;
  log.append(box);
  log.scrollTop = log.scrollHeight;
}

/** Follows the answer down, unless the user has scrolled up to read. */
function following() {
  const log = at("log");
  const near = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  return () => near && (log.scrollTop = log.scrollHeight);
}

function busy(is) {
  at("send").hidden = is;
  at("stop").hidden = !is;
  at("log").setAttribute("aria-busy", String(is));
  if (is) at("stop").focus();
  else at("prompt").focus();
}

async function ask(text, receiptOf) {
  const user = element("article", "message user", text);
  user.setAttribute("aria-label", "You");
  const answer = new Answer();
  show(user);
  show(answer.box);
  const system = at("system").value.trim();
  const asked = [...HISTORY, { role: "user", content: text }];
  const messages = system ? [{ role: "system", content: system }, ...asked] : asked;
  const turn = (running = { id: newId("chat"), abort: new AbortController() });
  busy(true);
  try {
    const stream = { stream: true, stream_options: { include_usage: true }, request_id: turn.id };
    const body = { model: await modelName(), messages, ...stream, ...settings() };
    const response = await call("v1/chat/completions", { body, signal: turn.abort.signal });
    for await (const data of events(response)) {
      // What has been received already is not shown after a stop.
      turn.abort.signal.throwIfAborted();
      if (data === "[DONE]") break;
      const follow = following();
      answer.take(JSON.parse(data));
      follow();
    }
    answer.say(answer.finish === "length" && "cut off at the token limit");
  } catch (error) {
    if (turn.abort.signal.aborted) {
      answer.say("stopped");
      showReceipt(answer, receiptOf(turn.id));
    } else {
      answer.fail(error);
    }
  }
  // What a turn of another chat says does not belong to this one.
  if (running === turn) {
    if (answer.text || answer.calls.length) HISTORY.push({ role: "user", content: text }, answer.message());
    running = null;
    busy(false);
  }
}

async function showReceipt(answer, coming) {
  const note = element("p", "receipt", "waiting for the engine's receipt");
  note.setAttribute("role", "status");
  const follow = following();
  answer.box.append(note);
  follow();
  const receipt = await coming;
  note.textContent = receipt ?? "The engine had ended it already, or is not being watched: no receipt.";
  if (receipt) note.dataset.known = "yes";
}

/** Ends the answer under way. */
export function stopChat() {
  running?.abort.abort();
}

/** Makes the chat work; `receiptOf(id)` promises the text of a request's receipt. */
export function wireChat(receiptOf) {
  const prompt = at("prompt");
  const grow = () => {
    prompt.style.height = "auto";
    prompt.style.height = `${Math.min(prompt.scrollHeight, 180)}px`;
  };
  const send = (text) => {
    if (!text.trim() || running) return;
    prompt.value = "";
    grow();
    ask(text.trim(), receiptOf);
  };
  prompt.addEventListener("input", grow);
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send(prompt.value);
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !at("key-dialog").open) stopChat();
  });
  at("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send(prompt.value);
  });
  at("stop").addEventListener("click", stopChat);
  at("new-chat").addEventListener("click", () => {
    const turn = running;
    running = null;
    turn?.abort.abort();
    HISTORY.length = 0;
    at("log").replaceChildren(at("welcome"));
    at("welcome").hidden = false;
    busy(false);
  });
  for (const idea of IDEAS) {
    const button = element("button", "idea", idea);
    button.type = "button";
    button.addEventListener("click", () => send(idea));
    at("ideas").append(button);
  }
}
