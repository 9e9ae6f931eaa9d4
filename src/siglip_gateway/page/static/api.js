// Requests to the gateway that served this page.

const KEY = "siglip-serve-key";

/** An answer that is an error, with the server's own message. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The key for the API, kept until the browser's tab is closed. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** The answer to `GET path`, or to `POST path` with a JSON body. */
export async function ask(path, body) {
  return (await send(path, body)).json();
}

/** A picture that the server holds, as a URL for <img>, which itself could send no key. */
export async function pictureUrl(path) {
  return URL.createObjectURL(await (await send(path)).blob());
}

async function send(path, body) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  const options = { headers };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["Content-Type"] = "application/json";
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new ApiError(0, "The gateway does not answer. Is the server still running?");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) document.dispatchEvent(new CustomEvent("key-needed"));
  throw new ApiError(answer.status, await messageOf(answer));
}

async function messageOf(answer) {
  const text = await answer.text();
  try {
    const found = JSON.parse(text);
    return found.error?.message ?? found.reason ?? found.detail ?? text;
  } catch {
    return text.slice(0, 300) || `status ${answer.status}`;
  }
}
