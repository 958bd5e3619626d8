// How the page talks to its server: the key, requests, and server-sent events.
//
// EventSource cannot send an Authorization header, so streams are read with fetch.

const KEY = "tidemill.key";

/** The key of this tab, or nothing. It is never written to disk. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

let asking = null;

/** Asks the user for a key. Calls that come while the question is open share its answer: whether there is a new key. */
export function askForKey({ refused = key.get() !== "" } = {}) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const input = document.getElementById("key");
    document.getElementById("key-error").hidden = !refused;
    input.value = "";
    dialog.addEventListener(
      "close",
      () => {
        asking = null;
        const given = dialog.returnValue === "given";
        if (given) key.set(input.value.trim());
        input.value = "";
        resolve(given);
      },
      { once: true },
    );
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
}

/** Lets the dialog's form end it. */
export function wireKeyDialog() {
  const dialog = document.getElementById("key-dialog");
  document.getElementById("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (document.getElementById("key").value.trim()) dialog.close("given");
  });
}

/** What the server said instead of answering. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/**
 * A request with this tab's key. Asks for one when the server wants it, and tries again.
 * Throws `Refused` for whatever is not a success.
 */
export async function call(path, { body, signal } = {}) {
  for (;;) {
    const used = key.get();
    const headers = used ? { authorization: `Bearer ${used}` } : {};
    if (body) headers["content-type"] = "application/json";
    const method = body ? "POST" : "GET";
    const response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
    if (response.ok) {
      document.getElementById("change-key").hidden = !used;
      return response;
    }
    // Another call may have asked meanwhile.
    if (response.status === 401 && (used !== key.get() || (await askForKey({ refused: used !== "" })))) continue;
    throw new Refused(response.status, await messageOf(response));
  }
}

async function messageOf(response) {
  try {
    const { error } = await response.json();
    const message = error?.message ?? error;
    if (typeof message === "string") return message;
  } catch {
    // Not JSON: the status has to do.
  }
  return `The server answered ${response.status}.`;
}

/** The data of each server-sent event of a response, in order. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    // Whoever leaves early closes the connection, and so aborts.
    reader.cancel().catch(() => {});
  }
}

/** Waits, in milliseconds. */
export const pause = (time) => new Promise((resolve) => setTimeout(resolve, time));

/** An element with a class and a text. Text is only ever set as text: nothing that comes from outside is markup here. */
export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== "") made.textContent = text;
  return made;
}

/** The element with this id. */
export const at = (id) => document.getElementById(id);
