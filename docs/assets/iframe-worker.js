// Where pages are opened from a disk, browsers start no workers: the search then runs in a hidden
// frame, which answers in the same way. Elsewhere this changes nothing.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inner = frame.contentWindow;
      const answer = (data) => {
        const event = new MessageEvent("message", { data });
        this.dispatchEvent(event);
        if (this.onmessage) this.onmessage(event);
      };
      inner.postMessage = answer; // what the worker says
      inner.importScripts = (...urls) =>
        urls.reduce(
          (before, source) =>
            before.then(
              () =>
                new Promise((done, failed) => {
                  const script = inner.document.createElement("script");
                  script.src = source;
                  script.onload = done;
                  script.onerror = failed;
                  inner.document.body.append(script);
                }),
            ),
          Promise.resolve(),
        );
      this.ask = (data) => inner.dispatchEvent(new inner.MessageEvent("message", { data }));
      const script = inner.document.createElement("script");
      script.src = new URL(url, location.href).href;
      script.onload = () => {
        this.ready = true;
        this.waiting.splice(0).forEach(this.ask);
      };
      inner.document.body.append(script);
    }
    postMessage(data) {
      if (this.ready) this.ask(data);
      else this.waiting.push(data);
    }
    terminate() {}
  };
}
