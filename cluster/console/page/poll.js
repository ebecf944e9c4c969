// Asks the console once a period while the page is in sight, waits longer after each failure, and says so.

const KEY = "expertmesh.key";
const LONGEST_MS = 15000;
const ANSWER_MS = 10000;

export class Poll {
  /** `names()`: what the page has; `onAnswer(data)`, `onKey(why)`, `onSilence({since, nextMs, why})`. */
  constructor({ names, onAnswer, onKey, onSilence }) {
    Object.assign(this, { names, onAnswer, onKey, onSilence });
    this.failures = 0;
    this.answeredAt = null;
    this.timer = null;
    this.asking = false;
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) clearTimeout(this.timer);
      else this.ask();
    });
  }

  get hasKey() {
    return sessionStorage.getItem(KEY) !== null;
  }

  useKey(key) {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
    this.ask();
  }

  async ask() {
    if (this.asking) return;
    clearTimeout(this.timer);
    this.asking = true;
    let waitMs = 1000;
    try {
      const headers = {};
      if (this.hasKey) headers.Authorization = `Bearer ${sessionStorage.getItem(KEY)}`;
      const query = new URLSearchParams(this.names());
      const answer = await fetch(`watch?${query}`, { headers, cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) });
      if (answer.status === 401 || answer.status === 403) {
        const why = !this.hasKey ? "" : answer.status === 401 ? "This is not a key of the console." : "This key may not see the service: it takes an admin key.";
        sessionStorage.removeItem(KEY);
        this.onKey(why);
        return; // until there is another key
      }
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      const data = await answer.json();
      this.failures = 0;
      this.answeredAt = Date.now() / 1000;
      waitMs = 1000 * data.period_s;
      this.onAnswer(data);
    } catch (error) {
      this.failures += 1;
      waitMs = Math.min(1000 * 2 ** (this.failures - 1), LONGEST_MS);
      const why = error.name === "TimeoutError" ? `no answer in ${ANSWER_MS / 1000} s` : error.message;
      this.onSilence({ since: this.answeredAt, nextMs: waitMs, why });
    } finally {
      this.asking = false;
    }
    if (!document.hidden) this.timer = setTimeout(() => this.ask(), waitMs);
  }
}
