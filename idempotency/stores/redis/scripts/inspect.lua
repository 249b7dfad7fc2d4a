-- Show a record to an operator; nothing for one that is absent or makes no sense.
-- KEYS[1] record
-- Reply: {version, state, attempt, hold, age (ms), remaining lease (ms), expires in (ms) or -1, result size or -1, scope, key,
-- time of the first claim (ms), name of the operation}
local key = KEYS[1]
local found = redis.pcall('HMGET', key, 'v', 's', 'a', 'l', 'h', 'n', 'c', 'k', 'o')
if found.err then
  if string.find(found.err, 'WRONGTYPE', 1, true) then return false end
  return found
end
for field = 1, 6 do
  local text = found[field]
  if not text or #text > 15 or not string.find(text, '^%d+$') then return false end
end
if not found[7] or not found[8] then return false end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local size = -1
if redis.call('HEXISTS', key, 'r') == 1 then size = redis.call('HSTRLEN', key, 'r') end
return {tonumber(found[1]), tonumber(found[2]), tonumber(found[3]), tonumber(found[5]), now - found[6], found[4] - now,
  redis.call('PTTL', key), size, found[7], found[8], tonumber(found[6]), found[9] or ''}
