-- Joins a worker to the queue or extends its lease, and with it its claims.
-- ARGV: worker, visibility ms (also of its lease), fingerprint of its model, the model, then the claims to extend
-- Returns {'ok', claims that have lapsed...}, or {'other', model}: live workers serve another model.
local worker, ends, fingerprint = ARGV[1], now + tonumber(ARGV[2]), ARGV[3]
redis.call('ZREMRANGEBYSCORE', WORKERS, '-inf', now)
local served = redis.call('HMGET', MODEL, 'fingerprint', 'info')
if served[1] ~= fingerprint then
  redis.call('ZREM', WORKERS, worker)
  if live_workers() > 0 and served[1] then
    return { 'other', served[2] }
  end
end
redis.call('HSET', MODEL, 'fingerprint', fingerprint, 'info', ARGV[4])
redis.call('ZADD', WORKERS, ends, worker)
local reply = { 'ok' }
for i = 5, #ARGV do
  if redis.call('ZSCORE', CLAIMS, ARGV[i]) then
    redis.call('ZADD', CLAIMS, ends, ARGV[i])
  else
    reply[#reply + 1] = ARGV[i]
  end
end
return reply
