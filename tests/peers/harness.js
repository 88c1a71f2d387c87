'use strict';

// What the two peers have in common, and nothing of either protocol engine.
//
// A peer is a Bayeux server that we did not write, run inside a process that we did. This file holds our
// part: two listening sockets (one for clients, one for the test that drives the peer), rules that say which
// coming requests or replies shall go wrong, and a record of what was asked. It knows HTTP and the shape of
// a Bayeux message; it does not know sessions, and it never answers a Bayeux message by itself.
//
// The process lives as long as its stdin: when the test run dies, however it dies, the pipe closes and the
// peer ends. Stdout carries one line, `{"port": N, "control": N, ...}`; everything else goes to stderr.

const http = require('node:http');
const { parseArgs } = require('node:util');

// The record of requests is a ring of this many; counters go on when old entries fall out.
const REQUESTS_MAX = 20_000;
// A control request is a line of JSON from our own tests; more than this is a mistake of theirs.
const CONTROL_BODY_MAX = 64 * 1024 * 1024;
// Rates are counted in slots of this length; `peak_per_s` is the busiest ten in a row.
const SLOT_MS = 100;

console.log = console.error; // faye prints stack traces with console.log; stdout is ours

/** Flags with defaults: `{name: default}`; a number stays a number, a boolean reads on/off, else text. */
function flags(defaults) {
    const options = {};
    for (const name of Object.keys(defaults)) {
        options[name] = { type: 'string' };
    }
    const { values } = parseArgs({ options });
    const result = { ...defaults };
    for (const [name, text] of Object.entries(values)) {
        const kind = typeof defaults[name];
        result[name] = kind === 'number' ? Number(text) : kind === 'boolean' ? text === 'on' : text;
        if (Number.isNaN(result[name])) {
            throw new Error(`--${name} wants a number, not ${text}`);
        }
    }
    return result;
}

/**
 * What shall go wrong, and when. A rule is `{kind, channel?, session?, skip?, count?, ...}`: it lets `skip`
 * matching occasions pass, applies to the next `count` (0: until cleared) and is then gone.
 */
class Rules {
    #rules = [];

    add({ skip = 0, count = 1, ...rule }) {
        this.#rules.push({ ...rule, skip, left: count || Infinity });
    }

    clear() {
        this.#rules = [];
    }

    get pending() {
        return this.#rules.length;
    }

    /** The rule that applies to this message now, used up by one; undefined where nothing shall go wrong. */
    take(wanted, message) {
        for (const rule of this.#rules) {
            const hit =
                wanted(rule) &&
                (rule.channel === undefined || rule.channel === message.channel) &&
                (rule.session === undefined || rule.session === message.clientId);
            if (!hit) {
                continue;
            }
            if (rule.skip > 0) {
                rule.skip -= 1;
                continue;
            }
            if (--rule.left === 0) {
                this.#rules.splice(this.#rules.indexOf(rule), 1);
            }
            return rule;
        }
        return undefined;
    }
}

/** What clients asked: counters by channel, requests a second, and the last requests as they came. */
class Watch {
    constructor() {
        this.reset();
    }

    reset() {
        this.started = performance.now();
        this.requests = 0;
        this.messages = {};
        this.published = {};
        this.slots = [];
        this.ring = [];
        this.dropped = 0;
    }

    request() {
        this.requests += 1;
        const slot = Math.floor((performance.now() - this.started) / SLOT_MS);
        this.slots[slot] = (this.slots[slot] ?? 0) + 1;
    }

    message(message, request) {
        if (message === null || typeof message !== 'object') {
            return;
        }
        this.messages[message.channel] = (this.messages[message.channel] ?? 0) + 1;
        this.ring.push({
            at_ms: performance.now() - this.started,
            connection: request?.socket?.remotePort,
            headers: request?.headers,
            message,
        });
        if (this.ring.length >= 2 * REQUESTS_MAX) {
            this.dropped += this.ring.length - REQUESTS_MAX;
            this.ring = this.ring.slice(-REQUESTS_MAX);
        }
    }

    get peak() {
        const width = 1000 / SLOT_MS;
        let running = 0;
        let peak = 0;
        for (let i = 0; i < this.slots.length; ++i) {
            running += (this.slots[i] ?? 0) - (this.slots[i - width] ?? 0);
            peak = Math.max(peak, running);
        }
        return peak;
    }

    stats() {
        const count = (name) => this.messages[`/meta/${name}`] ?? 0;
        return {
            uptime_ms: performance.now() - this.started,
            requests: this.requests,
            peak_per_s: this.peak,
            handshakes: count('handshake'),
            connects: count('connect'),
            subscribes: count('subscribe'),
            unsubscribes: count('unsubscribe'),
            disconnects: count('disconnect'),
            messages: this.messages,
            published: this.published,
            rss_bytes: process.memoryUsage.rss(),
            cpu_us: process.cpuUsage().user + process.cpuUsage().system,
        };
    }
}

/**
 * Makes the JSON text of the data of message `seq`: the template's fields, `seq`, and padding so that the
 * whole item `{"channel":…,"data":…}` has `size` bytes where a size is asked for.
 */
function numbered(channel, template, size) {
    const fields = JSON.stringify(template ?? {}).slice(1, -1);
    const head = `{${fields}${fields ? ',' : ''}"seq":`;
    if (size === undefined || size === null) {
        return (seq) => `${head}${seq}}`;
    }
    const padHead = ',"pad":"';
    const frame = Buffer.byteLength(`{"channel":${JSON.stringify(channel)},"data":${head}${padHead}"}}`);
    if (size < frame + 16) {
        throw new Error(`a message on ${channel} with these fields needs at least ${frame + 16} bytes, not ${size}`);
    }
    const padding = 'x'.repeat(size - frame);
    return (seq) => `${head}${seq}${padHead}${padding.slice(String(seq).length)}"}`;
}

/** Calls `send(k)` for k in 0..count-1: at once, or at `rate` a second. Resolves when all are sent. */
function paced(count, rate, send) {
    if (!rate) {
        for (let k = 0; k < count; ++k) {
            send(k);
        }
        return Promise.resolve();
    }
    return new Promise((resolve, reject) => {
        const started = performance.now();
        let sent = 0;
        const timer = setInterval(() => {
            try {
                const due = Math.min(count, Math.floor(((performance.now() - started) * rate) / 1000) + 1);
                while (sent < due) {
                    send(sent++);
                }
                if (sent === count) {
                    clearInterval(timer);
                    resolve();
                }
            } catch (failure) {
                clearInterval(timer);
                reject(failure);
            }
        }, 1);
    });
}

/**
 * The operation `publish`, given the engine's way to send one text: `{channel, count, first, size, data, rate}`
 * makes numbered messages, `{channel, texts}` sends these exact JSON texts.
 */
function publisher(watch, send, whole) {
    return async ({ channel, count, first = 1, size, data, rate, session, texts, whole: inOne }) => {
        const started = performance.now();
        const text = texts ? (seq) => texts[seq - first] : numbered(channel, data, size);
        const total = texts ? texts.length : count;
        const one = (k) => {
            send(channel, text(first + k), session);
            if (!texts) {
                watch.published[channel] = first + k;
            }
        };
        if (inOne && !rate) {
            whole(() => paced(total, 0, one));
        } else {
            await paced(total, rate, one);
        }
        return { first, last: first + total - 1, elapsed_ms: performance.now() - started };
    };
}

/**
 * Listens for clients and for control, prints the ready line, and ties the process to its stdin.
 * `operations` maps a name to a function of the request's JSON; it may return a promise.
 */
function serve({ port, keepAlive, handle, upgrade, operations, watch, rules, ready }) {
    const sockets = new Set();
    let opened = 0;

    const server = http.createServer({ keepAliveTimeout: keepAlive }, (request, response) => {
        watch.request();
        handle(request, response);
    });
    server.on('connection', (socket) => {
        opened += 1;
        sockets.add(socket);
        socket.on('close', () => sockets.delete(socket));
        socket.on('error', () => {}); // a client that goes away is what we test
    });
    if (upgrade) {
        server.on('upgrade', upgrade);
    }

    const all = {
        stats: () => ({
            ...watch.stats(),
            connections: sockets.size,
            connections_opened: opened,
            rules_pending: rules.pending,
        }),
        requests: ({ channel, last = REQUESTS_MAX }) => ({
            requests: watch.ring
                .slice(-REQUESTS_MAX)
                .filter((entry) => channel === undefined || entry.message.channel === channel)
                .slice(-last),
            dropped: watch.dropped,
        }),
        rule: (rule) => void rules.add(rule),
        clear: () => void rules.clear(),
        reset: () => void watch.reset(),
        drop: ({ reset = false }) => {
            const dropped = sockets.size;
            for (const socket of sockets) {
                reset ? socket.resetAndDestroy() : socket.destroy();
            }
            return { dropped };
        },
        ...operations({ sockets }),
    };

    const control = http.createServer((request, response) => {
        const chunks = [];
        let length = 0;
        request.on('data', (chunk) => {
            length += chunk.length;
            if (length > CONTROL_BODY_MAX) {
                request.destroy();
            }
            chunks.push(chunk);
        });
        request.on('end', async () => {
            let status = 200;
            let answer;
            try {
                const { op, ...rest } = JSON.parse(Buffer.concat(chunks).toString('utf8'));
                if (!Object.hasOwn(all, op)) {
                    throw new Error(`no operation ${op}; there are ${Object.keys(all).join(', ')}`);
                }
                answer = (await all[op](rest)) ?? {};
            } catch (failure) {
                status = 400;
                answer = { error: String(failure?.message ?? failure) };
            }
            response.writeHead(status, { 'Content-Type': 'application/json' });
            response.end(JSON.stringify(answer));
        });
    });

    process.stdin.on('end', () => process.exit(0));
    process.stdin.on('error', () => process.exit(0));
    process.stdin.resume();

    server.listen({ port, host: '127.0.0.1', backlog: 4096 }, () => {
        control.listen({ port: 0, host: '127.0.0.1' }, () => {
            const line = { port: server.address().port, control: control.address().port, ...ready };
            process.stdout.write(JSON.stringify(line) + '\n');
        });
    });
}

module.exports = { Rules, Watch, flags, publisher, serve };
