const CANNOT =
  'The model cannot start: a browser with module workers and WebAssembly is needed, and all files of the page.';

/** The worker as the page sees it: calls that answer once, and may tell of their progress before. */
export class Model {
  #worker = new Worker(new URL('model.mjs', import.meta.url), { type: 'module' });
  #waiting = new Map();
  #calls = 0;

  constructor() {
    this.#worker.onmessage = ({ data }) => this.#hear(data);
    this.#worker.onerror = (event) => this.#fail(event.message || CANNOT);
  }

  /** @returns {Promise<any>} the answer to `name`; `told` hears what comes before it */
  call(name, given = {}, told = () => {}) {
    const id = ++this.#calls;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject, told });
      this.#worker.postMessage({ id, name, given });
    });
  }

  #hear({ id, told, result, error }) {
    const call = this.#waiting.get(id);
    if (!call) return;
    if (told !== undefined) return call.told(told);
    this.#waiting.delete(id);
    if (error === undefined) call.resolve(result);
    else call.reject(new Error(error));
  }

  #fail(message) {
    for (const { reject } of this.#waiting.values()) reject(new Error(message));
    this.#waiting.clear();
  }
}
