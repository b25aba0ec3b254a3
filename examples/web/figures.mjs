/** What was measured in this page, in small print. */
export class Figures {
  #list;
  #rows = new Map();

  constructor(list) {
    this.#list = list;
  }

  /** Do `work` and show how many milliseconds it took. */
  async time(name, work) {
    const began = performance.now();
    const result = await work();
    this.#show(name, milliseconds(performance.now() - began));
    return result;
  }

  /** A clock for one text that starts now. */
  writing() {
    const began = performance.now();
    let first;
    return {
      token: () => {
        if (first === undefined) this.#show('first token after', milliseconds((first = performance.now()) - began));
      },
      done: (tokens) => {
        const seconds = (performance.now() - first) / 1000;
        const speed = tokens > 1 ? `, ${Math.round((tokens - 1) / seconds)} a second` : '';
        this.#show('written', `${tokens} tokens${speed}`);
      },
    };
  }

  #show(name, value) {
    if (!this.#rows.has(name)) this.#rows.set(name, this.#row(name));
    this.#rows.get(name).textContent = value;
  }

  #row(name) {
    const value = document.createElement('dd');
    const row = document.createElement('div');
    row.append(Object.assign(document.createElement('dt'), { textContent: name }), value);
    this.#list.append(row);
    return value;
  }
}

const milliseconds = (time) => (time < 10 ? `${time.toFixed(1)} ms` : `${Math.round(time).toLocaleString('en')} ms`);
