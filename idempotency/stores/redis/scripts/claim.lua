-- Own the record if it is absent or taken over; return what is there now.
-- KEYS[1] record; ARGV: format, token, fingerprint, lease (ms), lease + ttl (ms), hold, watched, scope, key, the last
-- end of a lease (ms) that is taken over[, name of the operation]
-- Reply: {now (ms), attempt, age (ms)} when the claim owns the record, else {now, version} when it cannot be read, else
-- {now, version, state, attempt, remaining lease (ms), hold, age (ms), token, fingerprint[, result]}.
local key = KEYS[1]
local found = redis.pcall('HMGET', key, 'v', 's', 't', 'f', 'a', 'l', 'h', 'r', 'w', 'n')
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if found.err then
  if string.find(found.err, 'WRONGTYPE', 1, true) then return {now, 0} end
  return found
end
-- A lease of 0 is over by every clock, also one that is set back.
local deadline = ARGV[4] == '0' and '0' or string.format('%.0f', now + ARGV[4])
local name = ARGV[11] and {'o', ARGV[11]} or {}

if not found[1] and redis.call('EXISTS', key) == 0 then
  redis.call('HSET', key, 'v', ARGV[1], 's', '1', 't', ARGV[2], 'f', ARGV[3], 'a', '1', 'l', deadline,
    'h', ARGV[6], 'c', ARGV[8], 'k', ARGV[9], 'n', string.format('%.0f', now), unpack(name))
  if ARGV[6] == '0' then redis.call('PEXPIRE', key, ARGV[5]) end
  return {now, 1, 0}
end

local function number(text)
  return text and #text < 16 and string.find(text, '^%d+$') and tonumber(text)
end
local version = number(found[1])
if version and version > tonumber(ARGV[1]) then return {now, version} end
local state, token, fingerprint = number(found[2]), found[3], found[4]
local attempt, lease, hold = number(found[5]), number(found[6]), found[7]
if not (version and version > 0 and state and state > 0 and state < 4 and attempt and attempt > 0 and lease
    and token and token ~= '' and fingerprint and (hold == '0' or hold == '1')) then
  return {now, 0}
end

local remaining = lease - now
local age = math.max(0, now - (number(found[10]) or now))
local mine = state == 1 and token == ARGV[2]
local same = fingerprint == ARGV[3]
if mine or (state == 1 and remaining <= 0 and lease <= tonumber(ARGV[10]) and hold == '0' and ARGV[6] == '0' and same) then
  if not mine then attempt = attempt + 1 end
  -- Scope and key too: the new owner may encrypt them, or with another key.
  redis.call('HSET', key, 't', ARGV[2], 'a', string.format('%.0f', attempt), 'l', deadline, 'h', ARGV[6],
    'c', ARGV[8], 'k', ARGV[9], unpack(name))
  if ARGV[6] == '1' then redis.call('PERSIST', key) else redis.call('PEXPIRE', key, ARGV[5]) end
  return {now, attempt, age}
end
if ARGV[7] == '1' and state == 1 and same and found[9] ~= '1' then
  redis.call('HSET', key, 'w', '1')
end
return {now, version, state, attempt, remaining, tonumber(hold), age, token, fingerprint, found[8] or nil}
