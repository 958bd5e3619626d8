// The live page: a chat on one side, the engine at work on the other.

import { at, askForKey, call, events, wireKeyDialog } from "./wire.js";
import { modelName, newId, stopChat, wireChat } from "./chat.js";
import { receiptOf, redraw, wireEngine } from "./engine.js";

const CROWD = [
  "Describe a harbour at low tide, and everything that lies on the ground.",
  "Explain how a watermill turns the flow of a river into flour.",
  "Tell a story about two friends who built a boat in a barn.",
  "List what one needs for a week of walking along a coast, and say why.",
  "Write a letter from a lighthouse keeper to a sister in the city.",
  "How do waves come about, and why do they break?",
  "Invent a recipe with seaweed, potatoes and an egg.",
  "What did people think of the moon before they knew what it is?",
];
/** Long enough to be watched. */
const CROWD_TOKENS = 900;
/** Browsers open six connections to a server. The live stream and the chat need theirs, so a crowd has one, and so many crowds may run. */
const MAX_CROWDS = 3;

const crowds = new Set();
let done = 0;

function showCrowd(error) {
  const left = [...crowds].reduce((sum, crowd) => sum + crowd.left, 0);
  const parts = [left && `${left} of ours`, done && `${done} done`, error?.message].filter(Boolean);
  at("crowd-state").textContent = parts.join(", ");
  at("crowd").disabled = crowds.size === MAX_CROWDS;
  at("stop-all").disabled = crowds.size === 0;
}

/** Several prompts in one request, which the engine serves as that many. Nobody reads their texts. */
async function runCrowd() {
  const crowd = { abort: new AbortController(), left: CROWD.length };
  if (crowds.size === 0) done = 0;
  crowds.add(crowd);
  showCrowd();
  let failed;
  try {
    const tokens = { max_tokens: CROWD_TOKENS, ignore_eos: true };
    const body = { model: await modelName(), prompt: CROWD, stream: true, request_id: newId("crowd"), ...tokens };
    const response = await call("v1/completions", { body, signal: crowd.abort.signal });
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const ended = (chunk.choices ?? []).filter((choice) => choice.finish_reason).length;
      crowd.left -= ended;
      done += ended;
      if (ended) showCrowd();
    }
  } catch (error) {
    if (!crowd.abort.signal.aborted) failed = error;
  }
  crowds.delete(crowd);
  showCrowd(failed);
}

function wireCrowd() {
  at("crowd").addEventListener("click", runCrowd);
  at("stop-all").addEventListener("click", () => {
    crowds.forEach((crowd) => crowd.abort.abort());
    stopChat();
  });
}

const THEMES = ["auto", "light", "dark"];

function wireTheme() {
  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
    at("theme").textContent = `◐ ${theme[0].toUpperCase()}${theme.slice(1)}`;
    at("theme").setAttribute("aria-label", `Colours: ${theme === "auto" ? "as the system" : theme}`);
    redraw();
  };
  at("theme").addEventListener("click", () => {
    const now = document.documentElement.dataset.theme;
    const next = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
    localStorage.setItem("tidemill.theme", next);
    show(next);
  });
  const chosen = localStorage.getItem("tidemill.theme");
  show(THEMES.includes(chosen) ? chosen : "auto");
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

/** On a narrow screen one side is shown at a time. */
function wireViews() {
  const buttons = document.querySelectorAll("[data-show]");
  for (const button of buttons) {
    button.addEventListener("click", () => {
      document.body.dataset.view = button.dataset.show;
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
    });
  }
}

wireKeyDialog();
at("change-key").addEventListener("click", () => askForKey({ refused: false }));
wireEngine();
wireTheme();
wireChat(receiptOf);
wireCrowd();
wireViews();
modelName().then((name) => {
  at("model").textContent = name;
  document.title = `${name} · Tidemill`;
}, () => {});
