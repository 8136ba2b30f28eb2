-- What all scripts share; it stands before each of them. An item is in exactly one of three states: waiting (in a class's
-- sorted set), claimed (its `claim` names a live claim), or gone (answered, cancelled, expired). Whoever finds it gone, or
-- claimed by another, lets it be: that is what makes an answer happen once.
--
-- All keys carry one hash tag, so that they lie on one node of a cluster.
local ITEMS = KEYS[1]         -- hash: item -> cmsgpack of {tokens, class, client, seq, deliveries, max_deliveries, claim}
local PAYLOADS = KEYS[2]      -- hash: item -> the request
local WAITING = { query = KEYS[3], document = KEYS[4] }  -- sorted sets: item by order of arrival (seq)
local CLAIMS = KEYS[5]        -- sorted set: claim by the time at which it lapses, ms
local CLAIM_ITEMS = KEYS[6]   -- hash: claim -> cmsgpack of its items
local DEADLINES = KEYS[7]     -- sorted set: item by the time at which it is answered with a timeout, ms
local CLIENTS = KEYS[8]       -- sorted set: client by the end of its lease, ms
local WORKERS = KEYS[9]       -- sorted set: worker by the end of its lease, ms
local MODEL = KEYS[10]        -- hash: what the workers serve
local COUNTERS = KEYS[11]     -- hash: counters that only grow, and `overtaken`
local WAKE = KEYS[12]         -- list: a token per worker that may be worth waking
local RESULTS = KEYS[13]      -- a client's results are the list RESULTS .. client

local CHUNK = 512             -- arguments per call: Lua's unpack has a limit
local SWEEP = 256             -- entries a sweep handles at most, so that no script holds Redis for long
local WAKE_TOKENS = 64

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function count(name, by)
  redis.call('HINCRBY', COUNTERS, name, by or 1)
end

local function append(list, a, b)
  list[#list + 1] = a
  list[#list + 1] = b
end

-- Calls a command of one key with many arguments, some at a time; `step` arguments belong together.
local function in_chunks(command, key, arguments, step)
  local size = CHUNK - CHUNK % (step or 1)
  for first = 1, #arguments, size do
    redis.call(command, key, unpack(arguments, first, math.min(first + size - 1, #arguments)))
  end
end

local function wake()
  if redis.call('LLEN', WAKE) < WAKE_TOKENS then
    redis.call('RPUSH', WAKE, 1)
  end
end

local function read_item(packed)
  local f = cmsgpack.unpack(packed)
  return { tokens = f[1], class = f[2], client = f[3], seq = f[4], deliveries = f[5], max_deliveries = f[6], claim = f[7] }
end

local function write_item(item)
  return cmsgpack.pack({ item.tokens, item.class, item.client, item.seq, item.deliveries, item.max_deliveries, item.claim })
end

local function get_item(id)
  local packed = redis.call('HGET', ITEMS, id)
  return packed and read_item(packed)
end

local leases = {}
local function client_lives(client)
  if leases[client] == nil then
    leases[client] = tonumber(redis.call('ZSCORE', CLIENTS, client) or 0) > now
  end
  return leases[client]
end

-- Drops an item from wherever it is.
local function forget(id, item)
  redis.call('ZREM', WAITING[item.class], id)
  redis.call('ZREM', DEADLINES, id)
  redis.call('HDEL', ITEMS, id)
  redis.call('HDEL', PAYLOADS, id)
end

-- Answers an item with an error, for good.
local function refuse(id, item, reason, message)
  forget(id, item)
  if client_lives(item.client) then
    redis.call('RPUSH', RESULTS .. item.client, cmsgpack.pack({ request_id = id, finish_reason = reason, error = message }))
  end
end

-- Ends a claim whose items were not answered. They wait again, at the place their arrival gave them.
-- counted: the delivery counts; false where the worker gave them back untouched.
local function lapse(claim, counted)
  local packed = redis.call('HGET', CLAIM_ITEMS, claim)
  redis.call('HDEL', CLAIM_ITEMS, claim)
  redis.call('ZREM', CLAIMS, claim)
  local returned = false
  for _, id in ipairs(packed and cmsgpack.unpack(packed) or {}) do
    local item = get_item(id)
    if item and item.claim == claim then
      if not counted then
        item.deliveries = item.deliveries - 1
      end
      if item.deliveries >= item.max_deliveries then
        refuse(id, item, 'error', 'input: given up: the worker that had it died, ' .. item.deliveries .. ' times')
        count('poisoned')
      else
        item.claim = ''
        redis.call('HSET', ITEMS, id, write_item(item))
        redis.call('ZADD', WAITING[item.class], item.seq, id)
        count('redelivered', counted and 1 or 0)
        returned = true
      end
    end
  end
  if returned then
    wake()
  end
end

-- What time has ended: claims of dead workers, items past their deadline, clients and workers that are gone.
local function sweep()
  for _, claim in ipairs(redis.call('ZRANGEBYSCORE', CLAIMS, '-inf', now, 'LIMIT', 0, SWEEP)) do
    count('lapsed_claims')
    lapse(claim, true)
  end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', DEADLINES, '-inf', now, 'LIMIT', 0, SWEEP)) do
    local item = get_item(id)
    if item then
      refuse(id, item, 'timeout', 'the request was not answered within its time')
      count('expired')
    else
      redis.call('ZREM', DEADLINES, id)
    end
  end
  for _, client in ipairs(redis.call('ZRANGEBYSCORE', CLIENTS, '-inf', now, 'LIMIT', 0, SWEEP)) do
    redis.call('ZREM', CLIENTS, client)
    redis.call('DEL', RESULTS .. client)
  end
  redis.call('ZREMRANGEBYSCORE', WORKERS, '-inf', now)
end

local function live_workers()
  return redis.call('ZCOUNT', WORKERS, now, '+inf')
end
