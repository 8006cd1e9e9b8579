/** Talks to the server. Every failure is a ServerError, whose message can be shown. */

export class ServerError extends Error {
  /** `param`: the option that is wrong, if the server names one. `status`: 0 if the server did not answer. */
  constructor(message, { param = null, status = 0 } = {}) {
    super(message);
    this.param = param;
    this.status = status;
  }
}

const GONE = "The server does not answer. Is it still running?";

export async function getJson(path) {
  return (await request(path)).json();
}

export async function postJson(path, body, signal = null) {
  return (await post(path, body, signal)).json();
}

/** Sends a request, and gives each event of the answer as it arrives. */
export async function* postStream(path, body, signal) {
  const answer = await post(path, body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      waiting += value;
      const events = waiting.split(/\r?\n\r?\n/);
      waiting = events.pop();
      for (const event of events) {
        const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5));
        if (data.length && data[0].trim() !== "[DONE]") yield JSON.parse(data.join("\n"));
      }
    }
  } catch (error) {
    if (signal.aborted) throw error;
    throw new ServerError("The connection to the server broke off.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function request(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ServerError(GONE);
  }
  if (!answer.ok) throw await errorOf(answer);
  return answer;
}

async function errorOf(answer) {
  const body = await answer.json().catch(() => null);
  const status = answer.status;
  if (body?.error?.message) return new ServerError(body.error.message, { param: body.error.param ?? null, status });
  if (Array.isArray(body?.detail) && body.detail.length) {
    const [{ msg, loc }] = body.detail;
    return new ServerError(msg, { param: String(loc?.at(-1) ?? ""), status });
  }
  return new ServerError(`The server answered with status ${status}.`, { status });
}
